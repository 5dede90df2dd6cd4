"""Hugging Face -> Megatron -> Hugging Face gives back every bit, and a folder that transformers
loads."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_tsft.checkpoint.card import ModelCard
from megatron_tsft.checkpoint.convert import export_hf, import_hf
from megatron_tsft.checkpoint.tokenizer import load_tokenizer, tokenizer_fingerprint
from megatron_tsft.checkpoint.verify import verify

Make = Callable[..., Path]
Read = Callable[[Path], dict[str, torch.Tensor]]
Same = Callable[[Path, Path], None]

CASES = {
    "llama2: no groups, untied, fp32": {"num_key_value_heads": 8},
    "llama3.1: groups, rope factor 8, bf16": {"rope_factor": 8.0, "dtype": torch.bfloat16},
    "llama3.2: tied, rope factor 32, bf16": {
        "rope_factor": 32.0,
        "tie_word_embeddings": True,
        "dtype": torch.bfloat16,
    },
    "smollm2: 3 groups of 3 heads, tied, sharded": {
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "hidden_size": 72,
        "head_dim": 8,
        "tie_word_embeddings": True,
        "shard": "60KB",
    },
    "one group, vocabulary that needs no padding, fp16": {
        "num_key_value_heads": 1,
        "vocab_size": 1024,
        "dtype": torch.float16,
    },
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_every_bit_comes_back(
    case: dict, make_hf: Make, assert_same_tensors: Same, tmp_path: Path
) -> None:
    source, megatron, target = make_hf(**case), tmp_path / "megatron", tmp_path / "back"
    card = import_hf(source, megatron, progress=False)
    done = export_hf(megatron, target, progress=False, max_shard_bytes=150_000)
    assert_same_tensors(source, target)
    assert done.files == len(list(target.glob("*.safetensors"))) > 1
    assert verify(source, megatron, progress=False).passed
    assert card == ModelCard.load(megatron)
    assert json.loads((target / "config.json").read_text())["torch_dtype"] == card.dtype


def test_transformers_loads_the_export_without_missing_or_unexpected_keys(
    make_hf: Make, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    source = make_hf(dtype=torch.bfloat16, rope_factor=8.0)
    import_hf(source, tmp_path / "megatron", progress=False)
    export_hf(tmp_path / "megatron", tmp_path / "back", progress=False)
    ids = torch.arange(40)[None]
    logits = []
    for folder in (source, tmp_path / "back"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(str(folder), output_loading_info=True)
        model, info = loaded
        assert (
            not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
        )
        assert model.dtype == torch.bfloat16
        with torch.no_grad():
            logits.append(model(input_ids=ids).logits)
    assert torch.equal(*logits)


def test_the_export_generates_what_the_original_does(make_hf: Make, tmp_path: Path) -> None:
    """As a user of transformers: the chat template's prompt in, greedy tokens out; from several
    files, in bf16."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = make_hf(dtype=torch.bfloat16, tokenizer=True, tie_word_embeddings=True, shard="60KB")
    settings = {
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "max_new_tokens": 12,
        "do_sample": False,
    }
    (source / "generation_config.json").write_text(json.dumps(settings))
    import_hf(source, tmp_path / "megatron", progress=False)
    export_hf(tmp_path / "megatron", tmp_path / "back", progress=False, max_shard_bytes=50_000)
    answers = []
    for folder in (source, tmp_path / "back"):
        tokenizer: Any = AutoTokenizer.from_pretrained(str(folder))
        model: Any = AutoModelForCausalLM.from_pretrained(str(folder))
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": "one plus two"}], return_tensors="pt", return_dict=True
        )
        assert model.generation_config.max_new_tokens == 12
        answers.append(model.generate(input_ids=prompt["input_ids"]).tolist())
    assert answers[0] == answers[1] and len(answers[0][0]) > 8


def test_tokenizer_template_and_generation_config_travel_through(
    make_hf: Make, tmp_path: Path
) -> None:
    source = make_hf(tokenizer=True)
    (source / "LICENSE").write_text("free")
    (source / "pytorch_model.bin").write_bytes(b"weights in another format")
    card = import_hf(source, tmp_path / "megatron", progress=False)
    export_hf(tmp_path / "megatron", tmp_path / "back", progress=False)
    tokenizer = load_tokenizer(tmp_path / "back")
    assert tokenizer_fingerprint(tokenizer) == card.tokenizer_fingerprint
    assert tokenizer.chat_template == load_tokenizer(source).chat_template is not None
    names = {path.name for path in (tmp_path / "back").iterdir()}
    assert {"generation_config.json", "LICENSE", "config.json", "tokenizer.json"} <= names
    assert "pytorch_model.bin" not in names


def test_another_dtype_on_request(make_hf: Make, read_tensors: Read, tmp_path: Path) -> None:
    source = make_hf(dtype=torch.bfloat16)
    import_hf(source, tmp_path / "megatron", progress=False)
    export_hf(tmp_path / "megatron", tmp_path / "back", dtype="fp32", progress=False)
    back = read_tensors(tmp_path / "back")
    for name, tensor in read_tensors(source).items():
        assert back[name].dtype == torch.float32 and torch.equal(back[name], tensor.float()), name
    assert json.loads((tmp_path / "back" / "config.json").read_text())["torch_dtype"] == "float32"


def test_tensors_of_several_dtypes_keep_their_own(
    make_hf: Make, read_tensors: Read, assert_same_tensors: Same, tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    source = make_hf(dtype=torch.bfloat16)
    tensors = read_tensors(source)
    # one layer of a stacked key, and fp32 that bf16 cannot hold
    layer = "model.layers.1.input_layernorm.weight"
    tensors[layer] = torch.full_like(tensors[layer], 1.0, dtype=torch.float32) + 1e-6
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    card = import_hf(source, tmp_path / "megatron", progress=False)
    assert card.dtype == "bfloat16" and card.other_dtypes == {layer: "float32"}
    assert verify(source, tmp_path / "megatron", progress=False).passed
    export_hf(tmp_path / "megatron", tmp_path / "back", progress=False)
    assert_same_tensors(source, tmp_path / "back")


def test_boxes_smaller_than_a_tensor_give_the_same_checkpoint(
    make_hf: Make, assert_same_tensors: Same, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_hf()
    whole = import_hf(source, tmp_path / "whole", progress=False)
    monkeypatch.setattr(
        "megatron_tsft.checkpoint.units.BOX_BYTES", 1000
    )  # 3 rows of 64 fp32: cuts across heads
    assert import_hf(source, tmp_path / "cut", progress=False) == whole
    export_hf(tmp_path / "cut", tmp_path / "back", progress=False)
    assert_same_tensors(source, tmp_path / "back")


def test_the_hash_follows_the_weights_and_not_their_shards(
    make_hf: Make, read_tensors: Read, tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    one, many = make_hf(name="one"), make_hf(name="many", shard="60KB")
    first = import_hf(one, tmp_path / "a", progress=False)
    assert import_hf(many, tmp_path / "b", progress=False).source_hash == first.source_hash
    tensors = read_tensors(one)
    tensors["model.norm.weight"][3] += 1
    save_file(tensors, one / "model.safetensors", metadata={"format": "pt"})
    assert import_hf(one, tmp_path / "c", progress=False).source_hash != first.source_hash
    result = verify(one, tmp_path / "a", progress=False)
    assert result.different == ["model.norm.weight"] and not result.passed
