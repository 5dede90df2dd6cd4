"""Megatron's own GPTModel, loaded by Megatron's own loader, computes the logits of transformers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_tsft.checkpoint import families
from megatron_tsft.checkpoint.architecture import decoder_arguments, rope_arguments
from megatron_tsft.checkpoint.convert import export_hf, import_hf
from megatron_tsft.checkpoint.families.llama import FAMILY as LLAMA
from megatron_tsft.checkpoint.families.llama import KEY_VALUE, LAYER, QUERY
from megatron_tsft.checkpoint.logits import compare_logits, difference, hf_logits, megatron_logits
from megatron_tsft.checkpoint.mapping import Family, Row, Source
from megatron_tsft.checkpoint.verify import verify
from tests.ranks import run_ranks

Make = Callable[..., Path]
Same = Callable[[Path, Path], None]


def random_ids(length: int) -> torch.Tensor:
    """[1, length] token ids below 1003."""
    return torch.randint(1003, (1, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)  # Megatron casts bf16 files as it loads
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_logits_are_those_of_transformers(tied: bool, dtype: torch.dtype, make_hf: Make, tmp_path: Path) -> None:
    source = make_hf(tie_word_embeddings=tied, dtype=dtype)
    import_hf(source, tmp_path / "megatron", progress=False)
    result = compare_logits(source, tmp_path / "megatron", random_ids(64))
    assert result.max_difference < 1e-4 and result.argmax_agreement == 1.0
    assert result.max_logit > 1 and result.positions == 64


def rank_logits(_: int, folder: Path, ids: torch.Tensor) -> torch.Tensor:
    return megatron_logits(folder, ids)


def test_rope_scaling_at_3072_positions_on_one_rank_and_on_two(make_hf: Make, tmp_path: Path) -> None:
    # dozens of positions would not exercise the scaling: only wavelengths above 2048 positions are scaled
    source = make_hf(rope_factor=32.0, num_attention_heads=4, num_hidden_layers=2)
    import_hf(source, tmp_path / "megatron", progress=False)
    ids = random_ids(3072)
    theirs, ours = hf_logits(source, ids), megatron_logits(tmp_path / "megatron", ids)
    for logits in (ours, *run_ranks(2, rank_logits, tmp_path / "megatron", ids)):
        result = difference(logits, theirs)
        assert result.max_difference < 1e-4 and result.argmax_agreement == 1.0 and result.positions == 3072
    without = megatron_logits(tmp_path / "megatron", ids, rope_scaling=False)
    assert (ours - without).abs().max() > 0.1


def test_tensor_parallel_ranks_may_share_a_key_value_head_and_pad_the_vocabulary_more(
    make_hf: Make, tmp_path: Path
) -> None:
    source = make_hf(num_key_value_heads=1, vocab_size=1100)  # padded to 1152 in the checkpoint, to 1280 at TP 2
    import_hf(source, tmp_path / "megatron", progress=False)
    ids = random_ids(64)
    for logits in run_ranks(2, rank_logits, tmp_path / "megatron", ids):
        assert logits.shape == (1, 64, 1100)
        assert difference(logits, hf_logits(source, ids)).max_difference < 1e-4


def test_verify_compares_logits_on_a_text(make_hf: Make, tmp_path: Path) -> None:
    source, text = make_hf(tokenizer=True), tmp_path / "text.txt"
    text.write_text("one and two is three " * 10)
    import_hf(source, tmp_path / "megatron", progress=False)
    result = verify(source, tmp_path / "megatron", text, progress=False)
    assert result.passed and result.logits is not None and result.logits.positions == 50


def biased_arguments(config: Any) -> tuple[dict[str, Any], float | None]:
    rope, factor = rope_arguments(config)
    return decoder_arguments(config) | rope | {"add_qkv_bias": True}, factor


def normed_arguments(config: Any) -> tuple[dict[str, Any], float | None]:
    rope, factor = rope_arguments(config)
    return decoder_arguments(config) | rope | {"qk_layernorm": True}, factor


BIAS = Row(
    "decoder.layers.self_attention.linear_qkv.bias",
    "qkv",
    (
        Source(LAYER + "self_attn.q_proj.bias", (QUERY,)),
        Source(LAYER + "self_attn.k_proj.bias", (KEY_VALUE,)),
        Source(LAYER + "self_attn.v_proj.bias", (KEY_VALUE,)),
    ),
    when="add_qkv_bias",
)
NORMS = tuple(
    Row(
        f"decoder.layers.self_attention.{letter}_layernorm.weight",
        "plain",
        (Source(LAYER + f"self_attn.{letter}_norm.weight", ("kv_channels",)),),
        when="qk_layernorm",
    )
    for letter in "qk"
)


@pytest.mark.parametrize(
    ("architecture", "arguments"), [("Qwen2ForCausalLM", biased_arguments), ("Qwen3ForCausalLM", normed_arguments)]
)
def test_a_new_family_is_data(
    architecture: str,
    arguments: Callable[[Any], tuple[dict[str, Any], float | None]],
    make_hf: Make,
    assert_same_tensors: Same,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Bias on qkv and norms on query and key are rows of a table; converter and verification stay as they are."""
    family = Family(
        name="new",
        architectures=(architecture,),
        arguments=arguments,
        rows=(*LLAMA.rows, BIAS, *NORMS),
        ignored=(),
        extra_states=LLAMA.extra_states,
    )
    monkeypatch.setattr(families, "families", lambda: {"new": family})
    source = make_hf(architecture, head_dim=8)
    import_hf(source, tmp_path / "megatron", progress=False)
    result = compare_logits(source, tmp_path / "megatron", random_ids(64))
    assert result.max_difference < 1e-4 and result.argmax_agreement == 1.0
    export_hf(tmp_path / "megatron", tmp_path / "back", progress=False)
    assert_same_tensors(source, tmp_path / "back")
