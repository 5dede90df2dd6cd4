"""Which combinations a test's cases meet: for grids that are a covering design, not the full
product.

An error that depends on two or three properties of a case shows in some case wherever each pair or
triple of them meets, so a grid need not be larger than that takes.
"""

import itertools
from collections.abc import Iterable, Sequence
from typing import Any


def met(rows: Iterable[Sequence[Any]], size: int) -> set[tuple[tuple[int, Any], ...]]:
    """The combinations of `size` columns' values that stand together in some row, each value with
    its column."""
    return {
        combination for row in rows for combination in itertools.combinations(enumerate(row), size)
    }
