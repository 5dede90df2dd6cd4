"""For any family, shape, dtype and sharding: every bit comes back, and lies where plain reshapes
say it lies."""

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from megatron_tsft.checkpoint import units
from megatron_tsft.checkpoint.convert import export_hf, import_hf
from megatron_tsft.checkpoint.folder import latest_checkpoint
from megatron_tsft.checkpoint.torch_dist_reader import CheckpointReader
from megatron_tsft.checkpoint.verify import verify

# architecture -> (an expert's names for gate, up and down, or the dense layer's; fields of its own
# that are fixed)
DENSE = "mlp.{}_proj.weight"
ARCHITECTURES: dict[str, tuple[str, tuple[str, str, str], dict[str, Any]]] = {
    "LlamaForCausalLM": (DENSE, ("gate", "up", "down"), {}),
    "MistralForCausalLM": (DENSE, ("gate", "up", "down"), {"sliding_window": None}),
    "Qwen2ForCausalLM": (DENSE, ("gate", "up", "down"), {}),
    "Qwen3ForCausalLM": (DENSE, ("gate", "up", "down"), {}),
    "Qwen3MoeForCausalLM": ("mlp.experts.@.{}_proj.weight", ("gate", "up", "down"), {}),
    "MixtralForCausalLM": (
        "block_sparse_moe.experts.@.{}.weight",
        ("w1", "w3", "w2"),
        {"sliding_window": None},
    ),
}
INTEGERS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
BYTES = [1, 150, 999, 4096, 2**25]  # of a box or a file: less than a row, a few rows, everything


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    """An architecture, its config, a dtype, a seed and how both sides are cut.

    No matrix has one row or column: transformers 5.12 saves experts squeezed.
    """
    architecture = draw(st.sampled_from(sorted(ARCHITECTURES)))
    groups, per_group = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    heads, experts = groups * per_group, draw(st.integers(2, 5))
    renormalised = architecture == "MixtralForCausalLM" or draw(st.booleans())
    config = {
        "vocab_size": draw(st.one_of(st.integers(1, 300), st.sampled_from([127, 128, 129, 256]))),
        "hidden_size": heads * draw(st.integers(2, 6)),
        "intermediate_size": draw(st.integers(2, 40)),
        "num_hidden_layers": draw(st.integers(1, 3)),
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": 2 * draw(st.integers(1, 6)),
        "tie_word_embeddings": draw(st.booleans()),
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if "@" in ARCHITECTURES[architecture][0]:
        config |= {
            "num_local_experts": experts,
            "num_experts_per_tok": draw(st.integers(1 + renormalised, experts)),
        }
    if architecture == "Qwen3MoeForCausalLM":
        config |= {
            "moe_intermediate_size": draw(st.integers(2, 20)),
            "norm_topk_prob": renormalised,
        }
    return {
        "architecture": architecture,
        "config": config | ARCHITECTURES[architecture][2],
        "dtype": draw(st.sampled_from(sorted(INTEGERS, key=str))),
        "seed": draw(st.integers(0, 2**31)),
        "hf_shard": draw(st.sampled_from(BYTES[1:])),
        "export_shard": draw(st.sampled_from(BYTES)),
        "box": draw(st.sampled_from(BYTES)),
    }


def save_model(folder: Path, problem: dict[str, Any]) -> None:
    """A model of random bits (NaN with any payload, infinity, subnormal numbers and -0 among
    them)."""
    import transformers

    config_class = getattr(transformers, problem["architecture"].replace("ForCausalLM", "Config"))
    model = getattr(transformers, problem["architecture"])(config_class(**problem["config"])).to(
        problem["dtype"]
    )
    generator = torch.Generator().manual_seed(problem["seed"])
    integer = INTEGERS[problem["dtype"]]
    limits = torch.iinfo(integer)
    for parameter in model.parameters():
        bits = torch.randint(
            limits.min, limits.max, parameter.shape, generator=generator, dtype=integer
        )
        parameter.data.copy_(bits.view(problem["dtype"]))
    model.save_pretrained(str(folder), max_shard_size=problem["hf_shard"])


def load_all(folder: Path) -> dict[str, Tensor]:
    return {
        name: tensor
        for file in folder.glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }


def same(ours: Tensor, theirs: Tensor) -> bool:
    if ours.dtype != theirs.dtype or ours.shape != theirs.shape:
        return False
    return torch.equal(ours.contiguous().view(torch.uint8), theirs.contiguous().view(torch.uint8))


def query_key_value(tensors: dict[str, Tensor], layer: int, kind: str, groups: int) -> Tensor:
    """A group's query heads, then its key head, then its value head; group after group."""
    parts = [tensors[f"model.layers.{layer}.self_attn.{x}_proj.{kind}"] for x in "qkv"]
    columns = parts[0].shape[1:]
    return torch.cat([part.reshape(groups, -1, *columns) for part in parts], dim=1).reshape(
        -1, *columns
    )


def check_layout(problem: dict[str, Any], tensors: dict[str, Tensor], checkpoint: Path) -> None:
    """Every layer's attention and MLP and both vocabulary tensors of a checkpoint, against the
    Hugging Face tensors."""
    config, reader = problem["config"], CheckpointReader(checkpoint)
    template, names, _ = ARCHITECTURES[problem["architecture"]]

    def stored(key: str, *index: int) -> Tensor:
        """The tensor at an index of the leading dimensions."""
        shape = tuple(reader.tensor(key).size)
        whole = reader.read(key, tuple(0 for _ in shape), shape)
        return whole[index]

    kinds = ("weight", "bias") if problem["architecture"] == "Qwen2ForCausalLM" else ("weight",)
    for layer in range(config["num_hidden_layers"]):
        for kind in kinds:
            expected = query_key_value(tensors, layer, kind, config["num_key_value_heads"])
            assert same(stored(f"decoder.layers.self_attention.linear_qkv.{kind}", layer), expected)
        expert_counts = range(config["num_local_experts"]) if "@" in template else [None]
        for expert in expert_counts:
            index = (layer,) if expert is None else (layer, expert)
            module = "decoder.layers.mlp." + ("" if expert is None else "experts.experts.")
            prefix = f"model.layers.{layer}." + template.replace("@", str(expert))
            gate, up, down = (tensors[prefix.format(name)] for name in names)
            assert same(stored(f"{module}linear_fc1.weight", *index), torch.cat([gate, up]))
            assert same(stored(f"{module}linear_fc2.weight", *index), down)
    vocabulary = {"embedding.word_embeddings.weight": "model.embed_tokens.weight"}
    if not config["tie_word_embeddings"]:
        vocabulary["output_layer.weight"] = "lm_head.weight"
    for key, name in vocabulary.items():
        padded = stored(key)
        assert len(padded) == -(-config["vocab_size"] // 128) * 128
        assert same(padded[: config["vocab_size"]], tensors[name])
        assert not padded[config["vocab_size"] :].contiguous().view(torch.uint8).any()


@pytest.mark.slow
@settings(max_examples=40)
@given(problems())
def test_every_bit_comes_back_and_lies_where_it_should(problem: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(units, "BOX_BYTES", problem["box"])
        source, megatron, back = (Path(name) / folder for folder in ("hf", "megatron", "back"))
        save_model(source, problem)
        tensors = load_all(source)
        card = import_hf(source, megatron, progress=False)
        assert (card.dtype, card.other_dtypes) == (str(problem["dtype"]).removeprefix("torch."), {})
        check_layout(problem, tensors, latest_checkpoint(megatron))
        assert verify(
            source, megatron, weights_only=True, progress=False
        ).passed  # logits of NaN are NaN
        done = export_hf(megatron, back, progress=False, max_shard_bytes=problem["export_shard"])
        returned = load_all(back)
        assert returned.keys() == tensors.keys() and done.tensors == len(tensors)
        assert done.files == len(list(back.glob("*.safetensors")))
        assert not [key for key, tensor in tensors.items() if not same(returned[key], tensor)]
