"""Every objective, path and dtype on 1 to 4 vocabulary shards: the published gradient, the
surrogate's value."""

import itertools
from typing import Any

import pytest
import torch

from tests.covering import met
from tests.loss.cases import (
    Case,
    check_or_skip,
    implementations,
    random_case,
    results_of,
    shift_of,
)
from tests.loss.published import NAMES

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# a shard has 7 columns (one rank alone 13): never a multiple of 8; 5 of all columns are padding,
# most of the last shard
WIDTH, ALONE, PADDING = 7, 13, 5
VARIANTS = ["plain", "rich"]  # see random_case
Results = dict[tuple[str, torch.dtype], tuple[Case, dict[str, Any] | None]]


def variant_of(name: str, dtype: torch.dtype, shift: int) -> str:
    """The variant that an objective and a type are tried in. It alternates along both, so one
    implementation meets every objective and every type in both variants, and two whose shifts
    differ by one meet all triples."""
    return VARIANTS[(NAMES.index(name) + DTYPES.index(dtype) + shift) % 2]


# Triton's interpreter on one rank was the slowest of the fast tests: each objective in one type,
# each type with a third of them, and so on four; the slow tests have all of them on two and three
QUICKLY = ("triton-tp1", "triton-tp4")
QUICK = [(name, DTYPES[1 + i % len(DTYPES[1:])]) for i, name in enumerate(NAMES)]


def test_every_pair_is_met() -> None:
    axes = NAMES, DTYPES, VARIANTS
    rows = [[(n, d, variant_of(n, d, shift)) for n in NAMES for d in DTYPES] for shift in (0, 1)]
    for one in rows:
        assert met(one, 2) == met(itertools.product(*axes), 2)
    assert met(rows[0] + rows[1], 3) == met(itertools.product(*axes), 3)
    assert met(QUICK, 1) == met(itertools.product(NAMES, DTYPES[1:]), 1)
    assert {shift_of(f"triton-tp{n}") % 2 for n in (2, 3)} == {0, 1}
    for path in ("torch", "fused"):  # of each path, every triple on few ranks and on many
        assert all(
            {shift_of(f"{path}-tp{n}") % 2 for n in two} == {0, 1} for two in ((1, 2), (3, 4))
        )


@pytest.fixture(scope="module", params=implementations(1, 2, 3, 4, quick=True))
def results(request: pytest.FixtureRequest) -> Results:
    """All cases of one implementation; the ranks start once for all of them."""
    world = 1 if request.param == "reference" else int(request.param[-1])
    width = ALONE if world == 1 else WIDTH * world
    keys = QUICK if request.param in QUICKLY else list(itertools.product(NAMES, DTYPES))
    variants = [variant_of(*key, shift_of(request.param)) for key in keys]
    cases = [
        random_case(
            name, seed, width=width, vocab_size=width - PADDING, dtype=dtype, variant=variant
        )
        for seed, ((name, dtype), variant) in enumerate(zip(keys, variants, strict=True))
    ]
    return dict(zip(keys, zip(cases, results_of(request.param, cases), strict=True), strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("name", NAMES)
def test_value_and_gradient(results: Results, name: str, dtype: torch.dtype) -> None:
    if (name, dtype) not in results:
        pytest.skip("this type on more ranks")
    check_or_skip(*results[name, dtype])
