"""Every objective, path and dtype on 1 to 4 vocabulary shards: the published gradient, the
surrogate's value."""

from typing import Any

import pytest
import torch

from tests.loss.cases import Case, check_or_skip, implementations, random_case, results_of
from tests.loss.published import NAMES

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# a shard has 7 columns (one rank alone 13): never a multiple of 8; 5 of all columns are padding,
# most of the last shard
WIDTH, ALONE, PADDING = 7, 13, 5
VARIANTS = ["plain", "rich"]  # see random_case
Results = dict[tuple[str, torch.dtype, str], tuple[Case, dict[str, Any] | None]]


@pytest.fixture(scope="module", params=implementations(1, 2, 3, 4, quick=True))
def results(request: pytest.FixtureRequest) -> Results:
    """All cases of one implementation; the ranks start once for all of them."""
    world = 1 if request.param == "reference" else int(request.param[-1])
    width = ALONE if world == 1 else WIDTH * world
    keys = [(name, dtype, variant) for name in NAMES for dtype in DTYPES for variant in VARIANTS]
    cases = [
        random_case(
            name, seed, width=width, vocab_size=width - PADDING, dtype=dtype, variant=variant
        )
        for seed, (name, dtype, variant) in enumerate(keys)
    ]
    return dict(zip(keys, zip(cases, results_of(request.param, cases), strict=True), strict=True))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("name", NAMES)
def test_value_and_gradient(results: Results, name: str, dtype: torch.dtype, variant: str) -> None:
    check_or_skip(*results[name, dtype, variant])
