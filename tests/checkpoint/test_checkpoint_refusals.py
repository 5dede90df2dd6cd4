"""What each family refuses by name, and damage to weights and their index, before anything is
written."""

import json
import re
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from megatron_tsft.checkpoint.convert import import_hf
from megatron_tsft.checkpoint.families import families
from megatron_tsft.checkpoint.refused import REFUSED
from megatron_tsft.checkpoint.verify import verify
from megatron_tsft.errors import UserError
from tests.checkpoint.conftest import TINY
from tests.checkpoint.test_checkpoint_errors import edit_config, refused

Make = Callable[..., Path]
Read = Callable[[Path], dict[str, torch.Tensor]]
Damage = Callable[[bytes], bytes]
Edit = Callable[[dict[str, Any], list[str]], None]

SERVED: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {},
    "MistralForCausalLM": {"sliding_window": None},
    "Qwen2ForCausalLM": {},
    "Qwen3ForCausalLM": {},
    "Qwen3MoeForCausalLM": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
    },
    "MixtralForCausalLM": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": None,
    },
}
MOE = {name: SERVED[name] for name in ("Qwen3MoeForCausalLM", "MixtralForCausalLM")}

KINDS = {
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 2.0},
    "longrope": {
        "short_factor": [1.0] * 8,
        "long_factor": [2.0] * 8,
        "original_max_position_embeddings": 4096,
    },
    "spiral": {},  # nobody's
}
WINDOW = {"use_sliding_window": True, "sliding_window": 512, "max_window_layers": 0}
WRONG = {
    "Mistral, window": ("MistralForCausalLM", {"sliding_window": 512}, "sliding_window=512"),
    "Mixtral, window": ("MixtralForCausalLM", {"sliding_window": 512}, "sliding_window=512"),
    "Qwen2, window": ("Qwen2ForCausalLM", WINDOW, "sliding_window=512"),
    "Qwen3, window": ("Qwen3ForCausalLM", WINDOW, "sliding_window=512"),
    "Qwen3-MoE, window": ("Qwen3MoeForCausalLM", WINDOW, "sliding_window=512"),
    "Qwen3, bias": ("Qwen3ForCausalLM", {"attention_bias": True}, "attention_bias=True: Qwen3"),
    "Qwen3-MoE, bias": (
        "Qwen3MoeForCausalLM",
        {"attention_bias": True},
        "attention_bias=True: Qwen3",
    ),
    "every second layer dense": (
        "Qwen3MoeForCausalLM",
        {"decoder_sparse_step": 2},
        "decoder_sparse_step=2: dense",
    ),
    "first layer dense": (
        "Qwen3MoeForCausalLM",
        {"mlp_only_layers": [0]},
        r"mlp_only_layers=\[0\]: dense layers",
    ),
    "Qwen3-MoE, one expert a token": (
        "Qwen3MoeForCausalLM",
        {"num_experts_per_tok": 1, "norm_topk_prob": True},
        "num_experts_per_tok=1: Megatron needs two",
    ),
    "Mixtral, one expert a token": (
        "MixtralForCausalLM",
        {"num_experts_per_tok": 1},
        "num_experts_per_tok=1: Megatron needs two",
    ),
    "jitter": (
        "MixtralForCausalLM",
        {"router_jitter_noise": 0.1},
        "router_jitter_noise=0.1: noise",
    ),
    "another task": (
        "LlamaForCausalLM",
        {"architectures": ["LlamaForSequenceClassification"]},
        r"architectures=\['LlamaForSequenceClassification'\]: this converter serves "
        r".*Mixtral.*Qwen3Moe",
    ),
    "no architecture": (
        "LlamaForCausalLM",
        {"architectures": None},
        r"architectures=\[\]: this converter serves",
    ),
    "an unknown model type": (
        "LlamaForCausalLM",
        {"model_type": "nobody", "architectures": ["NobodyForCausalLM"]},
        "config.json cannot be read .*`nobody`.*: correct it",
    ),
}


def rope(theta: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta}


def write_config(folder: Path, architecture: str, **values: Any) -> Path:
    """A folder with the config.json of a tiny model, without weights: a config is refused before
    they are missed."""
    config_class = getattr(transformers, re.sub("For.*", "Config", architecture))
    config_class(**(TINY | SERVED[architecture]), architectures=[architecture]).save_pretrained(
        str(folder)
    )
    edit_config(folder, **values)
    return folder


@pytest.mark.parametrize(("architecture", "values", "words"), WRONG.values(), ids=WRONG.keys())
def test_a_config_of_its_family(
    architecture: str, values: dict, words: str, tmp_path: Path
) -> None:
    refused(write_config(tmp_path / "hf", architecture, **values), tmp_path / "megatron", words)


@pytest.mark.parametrize("architecture", SERVED)
def test_positions_and_windows_of_every_family(architecture: str, tmp_path: Path) -> None:
    source, target = tmp_path / "hf", tmp_path / "megatron"
    refused(
        write_config(source, architecture), target, "holds no model.safetensors"
    )  # the config itself is served
    for kind, values in KINDS.items():
        rope = {"rope_type": kind, "rope_theta": 1e4} | values
        refused(
            write_config(source, architecture, rope_parameters=rope), target, f"rope_type='{kind}'"
        )
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    refused(
        write_config(source, architecture, rope_parameters=rope),
        target,
        "partial_rotary_factor=0.5",
    )
    refused(
        write_config(source, architecture, partial_rotary_factor=0.25),
        target,
        "partial_rotary_factor=0.25",
    )
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    refused(
        write_config(source, architecture, layer_types=kinds),
        target,
        "layer_types=.*sliding_attention|reads config.json as MinistralConfig",
    )
    refused(
        write_config(source, architecture, num_key_value_heads=3),
        target,
        "8 attention heads and 3 key-value",
    )


@pytest.mark.parametrize(
    "architecture", ["Qwen2ForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM"]
)
def test_a_window_that_is_switched_off_is_no_window(architecture: str, tmp_path: Path) -> None:
    values = WINDOW | {"use_sliding_window": False}  # as every Qwen2.5 says
    refused(
        write_config(tmp_path / "hf", architecture, **values),
        tmp_path / "megatron",
        "holds no model.safetensors",
    )


@pytest.mark.parametrize(
    ("architecture", "values", "words"),
    [
        (
            "LlamaForCausalLM",
            {"rope_parameters": {"rope_type": "default", "rope_theta": None}},
            "rope_theta",
        ),
        ("LlamaForCausalLM", {"num_key_value_heads": 0}, "num_key_value_heads|key-value heads"),
        ("LlamaForCausalLM", {"num_hidden_layers": 0}, "num_hidden_layers"),
        ("LlamaForCausalLM", {"vocab_size": 0}, "vocab_size"),
        ("Qwen3MoeForCausalLM", {"num_local_experts": 0}, "num_(local_)?experts"),
        ("Qwen3MoeForCausalLM", {"num_experts_per_tok": 0}, "num_experts_per_tok"),
        ("Qwen3MoeForCausalLM", {"num_experts_per_tok": 5}, "num_experts_per_tok"),
        ("MixtralForCausalLM", {"num_local_experts": 0}, "num_local_experts"),
        ("MixtralForCausalLM", {"num_experts_per_tok": 5}, "num_experts_per_tok"),
        ("LlamaForCausalLM", {"head_dim": 0}, "head_dim=0: it must be a whole number from 1"),
        ("LlamaForCausalLM", {"rms_norm_eps": -1e-5}, "rms_norm_eps=-1e-05: .* above 0"),
        (
            "LlamaForCausalLM",
            {"rope_parameters": rope(-10000.0)},
            "rope_theta=-10000.0: .* above",
        ),
        ("LlamaForCausalLM", {"rope_parameters": rope("x")}, "rope_theta"),
        ("LlamaForCausalLM", {"rope_parameters": [1]}, "rope_parameters|config.json"),
        ("LlamaForCausalLM", {"rms_norm_eps": float("nan")}, "NaN is no number"),
        ("LlamaForCausalLM", {"vocab_size": 5.5}, "vocab_size"),
        ("LlamaForCausalLM", {"vocab_size": True}, "vocab_size"),
        ("LlamaForCausalLM", {"hidden_size": 10**30}, "hidden_size"),
        ("LlamaForCausalLM", {"tie_word_embeddings": "no"}, "tie_word_embeddings"),
        ("LlamaForCausalLM", {"architectures": "LlamaForCausalLM"}, "architectures"),
        ("LlamaForCausalLM", {"architectures": [None]}, "architectures"),
        ("Qwen2ForCausalLM", {"layer_types": 3}, "layer_types"),
        ("Qwen3MoeForCausalLM", {"num_local_experts": 10**9}, "num_experts=1000000000: it must be"),
        ("Qwen3MoeForCausalLM", {"norm_topk_prob": 1}, "norm_topk_prob"),
        ("Qwen3MoeForCausalLM", {"moe_intermediate_size": "8"}, "moe_intermediate_size"),
    ],
)
def test_numbers_that_no_model_has(
    architecture: str, values: dict, words: str, make_hf: Make, tmp_path: Path
) -> None:
    source = make_hf(architecture, **SERVED[architecture])
    edit_config(source, **values)
    refused(source, tmp_path / "megatron", words)


@pytest.mark.parametrize("layers", [10**5, 10**7, 10**15])
@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen3MoeForCausalLM"])
def test_layers_without_end_take_no_memory(
    architecture: str, layers: int, make_hf: Make, tmp_path: Path
) -> None:
    source = make_hf(architecture, **SERVED[architecture])
    values = json.loads((source / "config.json").read_text())
    values.pop("layer_types", None)  # one name a layer
    (source / "config.json").write_text(json.dumps(values | {"num_hidden_layers": layers}))
    words = "num_hidden_layers=10*: it must be .* to 100000|holds .* tensors, its .* asks for"
    tracemalloc.start()
    refused(source, tmp_path / "megatron", words)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100e6


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"[1]", b"{", b"[" * 10**6, b'{"a":' * 900])
def test_a_config_that_is_no_object(content: bytes, make_hf: Make, tmp_path: Path) -> None:
    source = make_hf()
    (source / "config.json").write_bytes(content)
    refused(source, tmp_path / "megatron", r"config.json is damaged \(.*\): download or copy it")


@pytest.mark.parametrize("architecture", REFUSED)
def test_an_architecture_that_megatron_does_not_express_is_told_why(
    architecture: str, tmp_path: Path
) -> None:
    config_class = getattr(transformers, re.sub("For.*", "Config", architecture))
    config_class(architectures=[architecture]).save_pretrained(str(tmp_path / "hf"))
    refused(tmp_path / "hf", tmp_path / "megatron", re.escape(f"{architecture} is not supported"))
    refused(tmp_path / "hf", tmp_path / "megatron", re.escape(REFUSED[architecture]))


def test_every_served_architecture_is_here_and_none_is_refused() -> None:
    served = {name for family in families().values() for name in family.architectures}
    assert served == SERVED.keys() and not served & REFUSED.keys()


@pytest.mark.parametrize("architecture", MOE)
def test_experts_that_are_missing_or_too_many_or_of_another_shape(
    architecture: str, make_hf: Make, read_tensors: Read, tmp_path: Path
) -> None:
    source, target = make_hf(architecture, **MOE[architecture]), tmp_path / "megatron"
    tensors = read_tensors(source)

    def save(changed: dict[str, torch.Tensor]) -> None:
        save_file(changed, source / "model.safetensors", metadata={"format": "pt"})

    def without(name: str) -> dict[str, torch.Tensor]:
        return {key: tensor for key, tensor in tensors.items() if key != name}

    for expert in sorted(name for name in tensors if "layers.2" in name and "experts.3" in name):
        save(without(expert))
        refused(source, target, f"1 missing tensors, e.g. {re.escape(expert)}: its config.json")
    (router,) = (name for name in tensors if re.search(r"layers.1.*\.gate\.weight", name))
    save(without(router))
    refused(source, target, f"1 missing tensors, e.g. {re.escape(router)}: its config.json")
    save(tensors | {router: tensors[router][:3].contiguous()})
    refused(source, target, rf"{re.escape(router)} is \(3, 64\), config.json says \(4, 64\)")
    expert = next(name for name in tensors if "layers.0" in name and "experts.2" in name)
    save(tensors | {expert.replace("experts.2", "experts.4"): tensors[expert].clone()})
    refused(source, target, "1 unexpected tensors, e.g. .*experts.4")
    save(tensors | {expert: tensors[expert].T.contiguous()})
    refused(source, target, rf"{re.escape(expert)} is \(.*config.json says")
    save(tensors)
    edit_config(source, num_local_experts=3)  # what transformers saves for both
    refused(source, target, "9 unexpected tensors, e.g. .*experts.3")
    edit_config(source, num_local_experts=5)
    refused(source, target, "9 missing tensors, e.g. .*experts.4")


POINTER = (
    b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22e\n"
    b"size 12345\n"
)
DAMAGES: dict[str, Damage] = {
    "empty": lambda content: b"",
    "cut in the length": lambda content: content[:5],
    "cut in the header": lambda content: content[:100],
    "cut behind the header": lambda content: content[: 8 + int.from_bytes(content[:8], "little")],
    "cut in the data": lambda content: content[: len(content) // 2],
    "one byte short": lambda content: content[:-1],
    "one byte long": lambda content: content + b"\0",
    "zeros": lambda content: bytes(len(content)),
    "a pointer of git lfs": lambda content: POINTER,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
@pytest.mark.parametrize("shard", ["5GB", "60KB"])
def test_a_damaged_file(damage: Damage, shard: str, make_hf: Make, tmp_path: Path) -> None:
    source = make_hf(shard=shard)
    file = sorted(source.glob("*.safetensors"))[-1]
    file.write_bytes(damage(file.read_bytes()))
    refused(source, tmp_path / "megatron", f"{file.name} is damaged .*: download or copy it again")


NORM = "model.norm.weight"
INDEXES: dict[str, tuple[Edit, str]] = {
    "a tensor that no shard holds": (
        lambda where, files: where.update(ghost=files[0]),
        "ghost is not in .*00001-of-",
    ),
    "a tensor in another shard": (
        lambda where, files: where.update({NORM: files[0]}),
        f"{NORM} is not in .*00001-of-",
    ),
    "a shard that is not there": (
        lambda where, files: where.update({NORM: "x.safetensors"}),
        "x.safetensors is miss",
    ),
    "a shard elsewhere": (
        lambda where, files: where.update({NORM: f"../{files[-1]}"}),
        "lies outside of it",
    ),
    "a folder": (lambda where, files: where.update({NORM: ""}), "is missing"),
    "no file": (lambda where, files: where.update({NORM: None}), "index.json is damaged"),
    "a number": (lambda where, files: where.update({NORM: 3}), "index.json is damaged"),
    "nothing at all": (lambda where, files: where.clear(), "model.safetensors"),
}


@pytest.mark.parametrize(("edit", "words"), INDEXES.values(), ids=INDEXES.keys())
def test_an_index_that_the_shards_contradict(
    edit: Edit, words: str, make_hf: Make, tmp_path: Path
) -> None:
    source = make_hf(shard="60KB")
    edit_index(source, edit)
    refused(source, tmp_path / "megatron", words)


def edit_index(source: Path, edit: Edit) -> None:
    path = source / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    where = index["weight_map"]
    edit(where, sorted(set(where.values())))
    path.write_text(json.dumps(index))


def test_shards_that_hold_more_than_the_index_says(make_hf: Make, tmp_path: Path) -> None:
    source, target = make_hf(shard="60KB"), tmp_path / "megatron"
    first, last = (sorted(source.glob("*.safetensors"))[i] for i in (0, -1))
    tensors = load_file(last)
    assert NORM in tensors and NORM not in load_file(first)
    save_file(tensors | {"extra": torch.ones(2)}, last, metadata={"format": "pt"})
    refused(source, target, "1 unexpected tensors, e.g. extra")
    save_file(tensors, last, metadata={"format": "pt"})
    save_file(load_file(first) | {NORM: torch.full((64,), 7.0)}, first, metadata={"format": "pt"})
    edit_index(source, lambda where, files: where.update({NORM: files[0]}))
    refused(
        source, target, f"{NORM} is in .*{first.name} and .*{last.name}"
    )  # which one it is, nobody knows


def test_a_shard_may_hold_a_tensor_of_the_model_that_the_index_forgot(
    make_hf: Make, tmp_path: Path
) -> None:
    """As in transformers, which loads whatever the named shards hold."""
    source = make_hf(shard="60KB")
    whole = import_hf(source, tmp_path / "whole", progress=False).source_hash
    edit_index(source, lambda where, files: where.pop("model.layers.0.input_layernorm.weight"))
    assert import_hf(source, tmp_path / "again", progress=False).source_hash == whole


def test_a_stray_field_does_not_hide_a_window(make_hf: Make, tmp_path: Path) -> None:
    """Mistral's own code never looks at use_sliding_window."""
    source = make_hf("MistralForCausalLM", sliding_window=None)
    edit_config(source, sliding_window=512, use_sliding_window=False)
    refused(source, tmp_path / "megatron", "sliding_window=512")


def test_a_head_that_is_no_copy_of_the_embedding(
    make_hf: Make, read_tensors: Read, tmp_path: Path
) -> None:
    """transformers uses such a head, whatever tie_word_embeddings says."""
    from safetensors.torch import save_file

    source = make_hf(tie_word_embeddings=True)
    tensors = read_tensors(source)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    refused(source, tmp_path / "megatron", "lm_head.weight is not model.embed_tokens.weight")


def test_a_config_of_two_minds(make_hf: Make, tmp_path: Path) -> None:
    source = make_hf()
    edit_config(source, model_type="granite")
    refused(
        source,
        tmp_path / "megatron",
        "reads config.json as GraniteConfig, which does not go with"
        " architectures=.'LlamaForCausalLM",
    )


def test_odd_heads(make_hf: Make, tmp_path: Path) -> None:
    source = make_hf()
    edit_config(source, head_dim=15)
    refused(source, tmp_path / "megatron", "heads of 15 channels")


def test_adapters(make_hf: Make, tmp_path: Path) -> None:
    source = make_hf()
    (source / "adapter_config.json").write_text("{}")
    refused(source, tmp_path / "megatron", "holds a LoRA adapter: merge it")


def test_verify_of_two_models(make_hf: Make, tmp_path: Path) -> None:
    source, other = make_hf(), make_hf("Qwen3ForCausalLM", name="other")
    import_hf(source, tmp_path / "megatron", progress=False)
    with pytest.raises(
        UserError, match="other holds .*Qwen3.* made from LlamaForCausalLM: name the two folders"
    ):
        verify(other, tmp_path / "megatron", progress=False)
    edit_config(
        source, head_dim=32, num_attention_heads=4, num_key_value_heads=1
    )  # other shapes, the same tensors
    result = verify(source, tmp_path / "megatron", progress=False)
    assert not result.passed and "kv_channels is 32, in the checkpoint 16" in result.summary
    edit_config(source, head_dim=8, num_attention_heads=8)
    result = verify(source, tmp_path / "megatron", progress=False)
    assert (
        not result.passed
        and "logits not compared (config.json asks for other shapes)" in result.summary
    )
