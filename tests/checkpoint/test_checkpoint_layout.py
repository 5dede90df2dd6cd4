"""Where numbers lie: literal tiny layouts, the model card of a config, and the keys that Megatron
itself writes."""

import argparse
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from megatron_tsft.checkpoint.convert import import_hf
from megatron_tsft.checkpoint.families.llama import FAMILY
from megatron_tsft.checkpoint.folder import latest_checkpoint, read_metadata
from megatron_tsft.checkpoint.keys import checkpoint_keys
from megatron_tsft.checkpoint.mapping import segments
from megatron_tsft.checkpoint.megatron_model import build_model, cpu_ranks
from megatron_tsft.checkpoint.torch_dist_reader import CheckpointReader
from megatron_tsft.checkpoint.units import ConversionUnit, boxes_of, expected_keys
from tests.checkpoint.conftest import FAMILIES

Make = Callable[..., Path]
Read = Callable[[Path], dict[str, torch.Tensor]]


def lay_out(
    key: str, tensors: dict[str, list[float]], arguments: dict[str, int], padded: int = 0
) -> list[float]:
    """One layer of a Megatron key made from literal columns."""
    row = next(row for row in FAMILY.rows if row.megatron == key)
    index = (0,) if row.leading({"num_layers": 1}) else ()
    names = row.names(index)
    shapes = tuple((len(tensors[name]), 1) for name in names)
    places = segments(row, shapes, arguments, padded)
    rows = places[-1].target + places[-1].length
    unit = ConversionUnit(row, index, names, shapes, places, (*(1 for _ in index), rows, 1))
    read = {name: torch.tensor(values)[:, None] for name, values in tensors.items()}
    (box,) = boxes_of(unit, torch.float32, lambda name, start, stop: read[name][start:stop])
    assert box.sizes == unit.global_shape
    filled = torch.full(box.sizes, -1.0)
    box.fill(filled)
    return filled.flatten().tolist()


def test_qkv_lies_group_by_group() -> None:
    # 4 query heads over 2 groups, heads of one channel: group 0 is q0 q1 k0 v0
    tensors = {
        "model.layers.0.self_attn.q_proj.weight": [1.0, 2.0, 3.0, 4.0],
        "model.layers.0.self_attn.k_proj.weight": [5.0, 6.0],
        "model.layers.0.self_attn.v_proj.weight": [7.0, 8.0],
    }
    key = "decoder.layers.self_attention.linear_qkv.weight"
    assert lay_out(key, tensors, {"num_query_groups": 2}) == [1, 2, 5, 7, 3, 4, 6, 8]
    # the same numbers read as 2 heads of 2 channels over one group
    assert lay_out(key, tensors, {"num_query_groups": 1}) == [1, 2, 3, 4, 5, 6, 7, 8]


def test_gate_lies_above_up_and_the_vocabulary_above_zeros() -> None:
    gate_up = {
        "model.layers.0.mlp.gate_proj.weight": [1.0, 2.0],
        "model.layers.0.mlp.up_proj.weight": [3.0, 4.0],
    }
    assert lay_out("decoder.layers.mlp.linear_fc1.weight", gate_up, {}) == [1, 2, 3, 4]
    vocabulary = {"model.embed_tokens.weight": [1.0, 2.0, 3.0]}
    assert lay_out("embedding.word_embeddings.weight", vocabulary, {}, padded=5) == [1, 2, 3, 0, 0]


def test_the_card_says_what_builds_the_model(make_hf: Make, tmp_path: Path) -> None:
    source = make_hf(rope_factor=32.0, tie_word_embeddings=True, tokenizer=True)
    card = import_hf(source, tmp_path / "megatron", progress=False)
    assert card.megatron_arguments == {
        "num_layers": 3,
        "hidden_size": 64,
        "ffn_hidden_size": 112,
        "num_attention_heads": 8,
        "group_query_attention": True,
        "num_query_groups": 2,
        "kv_channels": 16,
        "layernorm_epsilon": 1e-5,
        "normalization": "RMSNorm",
        "swiglu": True,
        "add_bias_linear": False,
        "add_qkv_bias": False,
        "qk_layernorm": False,
        "untie_embeddings_and_output_weights": False,
        "max_position_embeddings": 131072,
        "position_embedding_type": "rope",
        "rotary_base": 500000,
        "rotary_percent": 1.0,
        "rotary_interleaved": False,
        "use_rope_scaling": True,
        "rope_scaling_factor": 32.0,
    }
    assert (card.vocab_size, card.padded_vocab_size) == (1003, 1024)
    assert card.tied and card.dtype == "float32" and card.family == "llama"


@pytest.mark.parametrize("case", FAMILIES.values(), ids=FAMILIES.keys())
def test_keys_and_shapes_are_those_that_megatron_saves(
    case: dict, make_hf: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.training.arguments import add_megatron_arguments

    card = import_hf(make_hf(**case), tmp_path / "megatron", progress=False)
    parser = add_megatron_arguments(argparse.ArgumentParser())
    assert card.megatron_arguments.keys() <= {action.dest for action in parser._actions}
    own = tmp_path / "own"
    own.mkdir()
    monkeypatch.setattr(
        torch.cuda, "synchronize", lambda *_: None
    )  # Megatron's writer calls it on any machine
    content = {
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
    }  # as training/checkpointing.py
    with cpu_ranks():
        model = build_model(card)
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        state = {
            "args": Namespace(num_layers=3),
            "checkpoint_version": 3.0,
            "iteration": 0,
            "model": model.sharded_state_dict(metadata=content | {"dp_cp_group": group}),
        }
        dist_checkpointing.save(state, str(own), content_metadata=content)
    ours = read_metadata(latest_checkpoint(tmp_path / "megatron")).state_dict_metadata
    theirs = read_metadata(own).state_dict_metadata
    assert (
        checkpoint_keys(own)
        == checkpoint_keys(tmp_path / "megatron" / "release")
        == expected_keys(card)
    )
    objects = {key for key, value in ours.items() if isinstance(value, BytesStorageMetadata)}
    own_objects = {key for key, value in theirs.items() if isinstance(value, BytesStorageMetadata)}
    assert own_objects <= objects  # Megatron raises on load where one is missing
    # what Transformer Engine's modules add, listed from a
    # model of its layers (2.20.2, built on CPU)
    engine = {"decoder.final_layernorm._extra_state/shard_0_1"}
    names = (
        ["self_attention.q_layernorm", "self_attention.k_layernorm"]
        if card.megatron_arguments["qk_layernorm"]
        else []
    )
    names += ["pre_mlp_layernorm"] if "num_experts" in card.megatron_arguments else []
    engine |= {
        f"decoder.layers.{name}._extra_state/shard_{layer}_3"
        for name in names
        for layer in range(3)
    }
    assert objects - own_objects == engine
    assert (own / "metadata.json").read_text() == (
        tmp_path / "megatron" / "release" / "metadata.json"
    ).read_text()


def test_megatron_reads_the_common_state(make_hf: Make, tmp_path: Path) -> None:
    from megatron.core import dist_checkpointing

    import_hf(make_hf(), tmp_path / "megatron", progress=False)
    state = dist_checkpointing.load_common_state_dict(str(tmp_path / "megatron" / "release"))
    assert state["checkpoint_version"] == 3.0 and state["iteration"] == 0
    assert state["args"].hidden_size == 64 and state["args"].tensor_model_parallel_size == 1
    content = dist_checkpointing.load_content_metadata(preloaded_state_dict=state)
    assert content is not None and content["singleton_local_shards"] is False


def test_a_stacked_key_holds_the_layers_in_order_and_padding_is_zero(
    make_hf: Make, read_tensors: Read, tmp_path: Path
) -> None:
    source = make_hf()
    import_hf(source, tmp_path / "megatron", progress=False)
    tensors, reader = (
        read_tensors(source),
        CheckpointReader(latest_checkpoint(tmp_path / "megatron")),
    )
    key = "decoder.layers.mlp.linear_fc2.weight"
    stacked = reader.read(key, (0, 0, 0), (3, 64, 112))
    for layer in range(3):
        assert torch.equal(stacked[layer], tensors[f"model.layers.{layer}.mlp.down_proj.weight"])
    embedding = reader.read("embedding.word_embeddings.weight", (0, 0), (1024, 64))
    assert (
        torch.equal(embedding[:1003], tensors["model.embed_tokens.weight"])
        and not embedding[1003:].any()
    )


def test_chunks_that_cannot_be_mapped_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A transposed tensor, as a run may save one, and a torch that does not tell where in the file
    a tensor lies."""
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    tensors = {
        "a": torch.randn(5, 7).t(),
        "b": torch.randn(3, 4).bfloat16(),
        "step": torch.tensor(7),
    }
    save(dict(tensors), storage_writer=FileSystemWriter(str(tmp_path)), no_dist=True)
    (tmp_path / "metadata.json").write_text("{}")
    load = torch.load

    def without_offsets(*arguments: Any, **keywords: Any) -> torch.Tensor:
        found = load(*arguments, **keywords)
        if keywords["map_location"] == "meta":
            del found.untyped_storage()._checkpoint_offset
        return found

    for replaced in (load, without_offsets):
        monkeypatch.setattr(torch, "load", replaced)
        reader = CheckpointReader(tmp_path)
        for name, tensor in tensors.items():
            assert torch.equal(
                reader.read(name, (0,) * tensor.dim(), tuple(tensor.shape)), tensor
            ), name
        assert torch.equal(reader.read("a", (2, 1), (3, 2)), tensors["a"][2:5, 1:3])
