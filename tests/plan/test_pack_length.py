"""Packs and conversations divide into every rank's chunks and blocks, or the message names lengths
that do."""

from typing import Any

import pytest

from megatron_tsft.errors import UserError
from megatron_tsft.plan.flags import Flags
from megatron_tsft.plan.pack_length import check_pack, document_multiple, pack_multiple
from megatron_tsft.plan.precision import FP4, FP8, scaled_format

MULTIPLE = "tsft_document_multiple"


def asked(given: dict[str, Any]) -> tuple[Flags, int]:
    """What the functions take, of flags by destination."""
    return Flags.of(given), given.get(MULTIPLE, 0)


def refusal(**given: Any) -> str:
    """The one line that a combination is refused with."""
    with pytest.raises(UserError) as caught:
        check_pack(*asked(given))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("given", "multiple"),
    [
        ({}, 1),
        (
            {"tensor_model_parallel_size": 4},
            1,
        ),  # without sequence parallelism every rank has all tokens
        ({"tensor_model_parallel_size": 4, "sequence_parallel": True}, 4),
        ({"context_parallel_size": 2}, 4),
        ({"context_parallel_size": 3}, 6),
        (
            {
                "context_parallel_size": 2,
                "tensor_model_parallel_size": 2,
                "sequence_parallel": True,
            },
            4,
        ),
        (
            {
                "context_parallel_size": 2,
                "tensor_model_parallel_size": 4,
                "sequence_parallel": True,
            },
            8,
        ),
        (
            {
                "context_parallel_size": 2,
                "tensor_model_parallel_size": 3,
                "sequence_parallel": True,
            },
            12,
        ),
        ({"fp8": "hybrid"}, 16),
        ({"fp8": "hybrid", "tensor_model_parallel_size": 4}, 16),
        ({"fp8": "hybrid", "tensor_model_parallel_size": 4, "sequence_parallel": True}, 64),
        ({"fp8": "e4m3", "fp8_recipe": "mxfp8"}, 32),
        ({"fp8": "e4m3", "fp8_recipe": "mxfp8", "context_parallel_size": 2}, 64),
        ({"fp4": "e2m1", "tensor_model_parallel_size": 2, "sequence_parallel": True}, 256),
        ({"tsft_document_multiple": 24}, 24),
        ({"tsft_document_multiple": 24, "fp8": "hybrid"}, 48),
        ({"tsft_document_multiple": 24, "context_parallel_size": 2}, 24),
        (
            {"pipeline_model_parallel_size": 8, "expert_model_parallel_size": 8},
            1,
        ),  # they cut no pack
    ],
    ids=lambda value: (
        "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else str(value)
    ),
)
def test_pack_multiple(given: dict[str, Any], multiple: int) -> None:
    """It fits, and it is the least that fits: every rank's tokens are whole blocks, in two chunks
    under CP."""
    assert pack_multiple(*asked(given)) == multiple
    context = given.get("context_parallel_size", 1)
    tensor = given.get("tensor_model_parallel_size", 1) if given.get("sequence_parallel") else 1
    found = scaled_format(Flags.of(given))
    block = found.recipe.block if found else 1

    def fits(length: int) -> bool:
        chunks = (
            length % given.get("tsft_document_multiple", 2 * context if context > 1 else 1) == 0
        )
        return chunks and length % context == 0 and length // context % (tensor * block) == 0

    assert fits(multiple)
    assert not any(fits(length) for length in range(1, multiple))


@pytest.mark.parametrize(
    ("length", "given", "words"),
    [
        (
            4095,
            {"tensor_model_parallel_size": 2, "sequence_parallel": True},
            ["of 2,", "parallel over 2", "4094 or 4096"],
        ),
        (
            4094,
            {"context_parallel_size": 2},
            ["multiple of 4,", "--context-parallel-size 2", "pass 4092 or 4096"],
        ),
        (4090, {"fp8": "hybrid"}, ["of 16,", "delayed's blocks of 16 tokens", "pass 4080 or 4096"]),
        (4112, {"fp8": "e4m3", "fp8_recipe": "mxfp8"}, ["of 32,", "mxfp8's", "pass 4096 or 4128"]),
        (
            4096,
            {"fp8": "hybrid", "tsft_document_multiple": 24},
            ["of 48,", "--tsft-document-multiple 24", "or 4128"],
        ),
        (
            24,
            {"fp8": "hybrid", "tensor_model_parallel_size": 2, "sequence_parallel": True},
            ["of 32,", "pass 32"],
        ),
    ],
)
def test_a_pack_that_does_not_divide(length: int, given: dict[str, Any], words: list[str]) -> None:
    text = refusal(seq_length=length, **given)
    assert all(word in text for word in [f"--seq-length {length} ", *words]), text


@pytest.mark.parametrize("recipe", ["delayed", "mxfp8"])
def test_the_lengths_it_names_fit(recipe: str) -> None:
    given = {
        "fp8": "hybrid",
        "fp8_recipe": recipe,
        "tensor_model_parallel_size": 2,
        "sequence_parallel": True,
    }
    given |= {"context_parallel_size": 2}
    for named in refusal(seq_length=4000, **given).rsplit("pass ", 1)[1].split(" or "):
        check_pack(*asked({"seq_length": int(named)} | given))


@pytest.mark.parametrize(
    ("given", "multiple"),
    [
        ({}, 1),
        ({"context_parallel_size": 4}, 8),
        ({"tsft_document_multiple": 6}, 6),
        ({"tsft_document_multiple": 16, "context_parallel_size": 4}, 16),
        (
            {"tsft_document_multiple": 12, "context_parallel_size": 4},
            "12 does not go with --context-parallel-size 4",
        ),
        ({"tsft_document_multiple": -2}, "-2: pass at least 1"),
    ],
)
def test_document_multiple(given: dict[str, Any], multiple: int | str) -> None:
    if isinstance(multiple, int):
        assert document_multiple(*asked(given)) == multiple
    else:
        with pytest.raises(UserError, match=f"--tsft-document-multiple {multiple}"):
            document_multiple(*asked(given))


def test_blocks_are_megatrons() -> None:
    from megatron.core.enums import Fp4Recipe, Fp8Recipe
    from megatron.core.fp4_utils import get_fp4_align_size
    from megatron.core.fp8_utils import get_fp8_align_size

    assert {name: recipe.block for name, recipe in FP8.items()} == {
        r.value: get_fp8_align_size(r) for r in Fp8Recipe
    }
    assert {name: recipe.block for name, recipe in FP4.items()} == {
        r.value: get_fp4_align_size(r) for r in Fp4Recipe
    }
