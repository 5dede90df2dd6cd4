"""Megatron's own GPTModel, loaded by Megatron's own loader, computes the logits of transformers:
every family."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_tsft.checkpoint.convert import export_hf, import_hf
from megatron_tsft.checkpoint.logits import compare_logits, difference, hf_logits, megatron_logits
from megatron_tsft.checkpoint.megatron_model import Layout
from megatron_tsft.checkpoint.verify import verify
from megatron_tsft.errors import UserError
from tests.checkpoint.conftest import FAMILIES
from tests.ranks import run_ranks

Make = Callable[..., Path]
Same = Callable[[Path, Path], None]

LAYOUTS = {"tp2": Layout(tensor=2), "pp2": Layout(pipeline=2), "ep2": Layout(expert=2)}
POSITIONS = 384
SCALED_POSITIONS = 3072  # only wavelengths above 2048 positions are scaled


def random_ids(length: int) -> torch.Tensor:
    """[1, length] token ids below 1003."""
    return torch.randint(1003, (1, length), generator=torch.Generator().manual_seed(1))


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Within 1e-5 of the largest logit, at every position."""
    result = difference(ours, theirs)
    assert result.max_difference < 1e-5 * max(1.0, result.max_logit), result
    assert result.max_logit > 1 and result.positions == theirs.shape[:-1].numel()


def rank_logits(_: int, folder: Path, ids: torch.Tensor, layout: Layout) -> torch.Tensor:
    return megatron_logits(folder, ids, layout)


@pytest.mark.parametrize("case", FAMILIES.values(), ids=FAMILIES.keys())
def test_every_family_in_every_layout(
    case: dict, make_hf: Make, assert_same_tensors: Same, tmp_path: Path
) -> None:
    source = make_hf(**case, num_attention_heads=8, num_hidden_layers=2)
    megatron = tmp_path / "megatron"
    card = import_hf(source, megatron, progress=False)
    export_hf(megatron, tmp_path / "back", progress=False)
    assert_same_tensors(source, tmp_path / "back")
    ids = random_ids(SCALED_POSITIONS if "rope_factor" in case else POSITIONS)
    theirs = hf_logits(source, ids)
    close(megatron_logits(megatron, ids), theirs)
    experts = "num_experts" in card.megatron_arguments
    for layout in (layout for name, layout in LAYOUTS.items() if experts or name != "ep2"):
        for logits in run_ranks(2, rank_logits, megatron, ids, layout):
            close(logits, theirs)


def test_without_its_scaling_a_model_is_another_one(make_hf: Make, tmp_path: Path) -> None:
    source = make_hf(rope_factor=32.0, num_hidden_layers=2)
    import_hf(source, tmp_path / "megatron", progress=False)
    ids = random_ids(SCALED_POSITIONS)
    ours, without = (
        megatron_logits(tmp_path / "megatron", ids, rope_scaling=scaled) for scaled in (True, False)
    )
    assert (ours - without).abs().max() > 0.1


def test_bf16_files_give_the_logits_of_their_numbers(make_hf: Make, tmp_path: Path) -> None:
    source = make_hf(dtype=torch.bfloat16)  # Megatron casts as it loads
    import_hf(source, tmp_path / "megatron", progress=False)
    result = compare_logits(source, tmp_path / "megatron", random_ids(64))
    assert result.max_difference < 1e-5 * result.max_logit and result.argmax_agreement == 1.0
    assert len(result.layers) == 3 and max(result.layers) < 1e-5


def test_ranks_may_share_a_key_value_head_and_pad_the_vocabulary_more(
    make_hf: Make, tmp_path: Path
) -> None:
    source = make_hf(
        num_key_value_heads=1, vocab_size=1100
    )  # padded to 1152 in the checkpoint, to 1280 at TP 2
    import_hf(source, tmp_path / "megatron", progress=False)
    ids = random_ids(64)
    for logits in run_ranks(2, rank_logits, tmp_path / "megatron", ids, LAYOUTS["tp2"]):
        assert logits.shape == (1, 64, 1100)
        close(logits, hf_logits(source, ids))


def test_verify_compares_logits_and_tokenizers(make_hf: Make, tmp_path: Path) -> None:
    source, text = make_hf(tokenizer=True), tmp_path / "text.txt"
    text.write_text("one and two is three " * 10)
    megatron = tmp_path / "megatron"
    import_hf(source, megatron, progress=False)
    result = verify(source, megatron, text, progress=False)
    assert result.passed and result.logits is not None and result.logits.positions == 50
    assert result.tokenizer == "" and "same argmax at 100.00%, worst layer" in result.summary
    assert verify(source, megatron, progress=False).logits is not None  # a text of our own
    only = verify(source, megatron, weights_only=True, progress=False)
    assert (
        only.passed
        and only.logits is None
        and "logits not compared (--weights-only)" in only.summary
    )
    template = source / "chat_template.jinja"
    template.write_text(template.read_text() + "!")
    result = verify(source, megatron, progress=False)
    assert (
        not result.passed
        and "the models DIFFER" in result.summary
        and "another chat template" in result.summary
    )
    (source / "tokenizer.json").unlink()
    (source / "tokenizer_config.json").unlink()
    result = verify(source, megatron, progress=False)
    assert not result.passed and f"{source} has none" in result.summary


def test_verify_names_the_layer_where_the_models_part(make_hf: Make, tmp_path: Path) -> None:
    import json

    source = make_hf()
    import_hf(source, tmp_path / "megatron", progress=False)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(
        json.dumps(config | {"rms_norm_eps": 0.1})
    )  # the weights stay the same
    result = verify(source, tmp_path / "megatron", progress=False)
    assert not result.passed and not result.different and result.tokenizer is None
    assert (
        result.logits is not None
        and min(result.logits.layers) > 1e-3
        and result.logits.positions == 256
    )
    assert "of 3: " in result.summary and "no tokenizer" in result.summary
    changed = "config.json: layernorm_epsilon is 0.1, in the checkpoint 1e-05"
    assert changed in result.summary
    result = verify(source, tmp_path / "megatron", weights_only=True, progress=False)
    assert not result.passed and changed in result.summary  # also where no logits show it


def test_verify_of_a_rounded_export(make_hf: Make, tmp_path: Path) -> None:
    """Weights in fp32, as a run on CPU saves them, against their export in bf16."""
    import_hf(make_hf(), tmp_path / "megatron", progress=False)
    export_hf(tmp_path / "megatron", tmp_path / "back", dtype="bf16", progress=False)
    result = verify(tmp_path / "back", tmp_path / "megatron", progress=False)
    assert result.passed and len(result.rounded) == 30 and not result.different
    assert "30 after rounding to the file's dtype" in result.summary


def test_verify_without_the_memory(
    make_hf: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import psutil

    source = make_hf(tokenizer=True)
    import_hf(source, tmp_path / "megatron", progress=False)
    memory = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory._replace(available=1000))
    result = verify(source, tmp_path / "megatron", progress=False)
    assert (
        result.passed and result.logits is None and "GB of memory, 0 GB are free" in result.summary
    )
    text = tmp_path / "text.txt"
    text.write_text("one and two")
    with pytest.raises(UserError, match="leave --text out, or use a machine with more memory"):
        verify(source, tmp_path / "megatron", text, progress=False)


def test_verify_says_what_is_wrong_with_a_text_or_the_numbers(
    make_hf: Make, tmp_path: Path
) -> None:
    import json

    source = make_hf(
        tokenizer=True, dtype=torch.bfloat16, vocab_size=9
    )  # the tokenizer has ten words
    import_hf(source, tmp_path / "megatron", progress=False)
    text = tmp_path / "text.txt"
    text.write_bytes(b"one and \xff\xfe")
    with pytest.raises(UserError, match="no text in UTF-8"):
        verify(source, tmp_path / "megatron", text, progress=False)
    text.write_text("one and two user")
    with pytest.raises(UserError, match="makes id 9, the model's vocabulary ends at 8"):
        verify(source, tmp_path / "megatron", text, progress=False)
    card = tmp_path / "megatron" / "tsft_model.json"
    content = json.loads(card.read_text())
    content["megatron_arguments"]["softmax_type"] = "off-by-one"
    del content["checksum"]
    card.write_text(json.dumps(content))
    with pytest.raises(UserError, match="softmax_type='off-by-one' is not built"):
        megatron_logits(tmp_path / "megatron", torch.ones(1, 4, dtype=torch.int64))
