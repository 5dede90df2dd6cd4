"""First-fit decreasing against the textbook loop, and epochs that hold every conversation once, in
a new order."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_tsft.data.packing import first_fit_decreasing, plan_epoch


def textbook(lengths: list[int], capacity: int) -> list[int]:
    """One item after the other into the first bin with room."""
    room: list[int] = []
    bins = []
    for length in lengths:
        place = next((i for i, free in enumerate(room) if free >= length), len(room))
        if place == len(room):
            room.append(capacity)
        room[place] -= length
        bins.append(place)
    return bins


@settings(max_examples=200)
@given(st.integers(1, 40), st.data())
def test_it_is_first_fit_decreasing(capacity: int, data: st.DataObject) -> None:
    lengths = sorted(data.draw(st.lists(st.integers(1, capacity), max_size=60)), reverse=True)
    ours = first_fit_decreasing(np.array(lengths, dtype=np.int64), capacity)
    assert ours.tolist() == textbook(lengths, capacity)


@pytest.fixture
def lengths() -> np.ndarray:
    return np.random.default_rng(0).integers(1, 65, size=500)


def test_an_epoch_holds_every_row_once_and_no_pack_overflows(lengths: np.ndarray) -> None:
    plan = plan_epoch(lengths, 64, seed=1, epoch=0)
    assert sorted(plan.rows.tolist()) == list(range(500))
    assert max(lengths[plan.pack(i)].sum() for i in range(len(plan))) <= 64
    assert min(len(plan.pack(i)) for i in range(len(plan))) >= 1
    assert len(plan) <= 1.25 * lengths.sum() / 64 + 1  # 11/9 of the optimum plus one, at most


def test_epochs_differ_but_have_as_many_packs(lengths: np.ndarray) -> None:
    plans = [plan_epoch(lengths, 64, seed=1, epoch=epoch) for epoch in range(3)]
    assert len({len(plan) for plan in plans}) == 1
    first, second = ({frozenset(p.pack(i).tolist()) for i in range(len(p))} for p in plans[:2])
    assert len(first & second) < len(first) / 2  # other conversations share a pack
    assert plans[0].rows.tolist() != plans[1].rows.tolist()


def test_a_plan_depends_on_seed_and_epoch_only(lengths: np.ndarray) -> None:
    a, b = (plan_epoch(lengths, 64, seed=7, epoch=4) for _ in range(2))
    assert a.rows.tolist() == b.rows.tolist() and a.starts.tolist() == b.starts.tolist()
    assert plan_epoch(lengths, 64, seed=8, epoch=4).rows.tolist() != a.rows.tolist()


def test_nothing_to_pack() -> None:
    assert len(plan_epoch(np.array([], dtype=np.int64), 8, seed=0, epoch=0)) == 0
