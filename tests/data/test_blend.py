"""Shares of a blend hold at every prefix, each member's items come in order, and item i follows
from i alone."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import default_collate

from megatron_tsft.data.batch import MicroBatch
from megatron_tsft.data.blend import PARTS, BlendedPacks, blend_place
from megatron_tsft.data.packed_dataset import PackedDataset
from megatron_tsft.data.prepare import prepare
from megatron_tsft.data.prepared import PreparedData
from tests.training.runs import make_tokenizer, write_rows

SHARES = [
    [0.7, 0.3],
    [1, 1],
    [0.001, 0.999],
    [97, 3],  # they need not add up to 1
    [0.5, 0.3, 0.2],
    [0.01, 0.9, 0.09],
    [1, 2, 4, 8, 16],
    [0.31, 0.05, 0.003, 0.6, 0.037],
]
examples = settings(max_examples=60)
some_shares = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=6)


def counts(places: Sequence[tuple[int, int]], members: int) -> list[int]:
    return [sum(member == i for member, _ in places) for i in range(members)]


def assert_fair(taken: Sequence[int], n: int, shares: Sequence[float]) -> None:
    """Of n items each member has its share: half an item at most is lost or won at each split that
    it passes."""
    assert sum(taken) == n
    whole = sum(map(Fraction, shares))
    for i, count in enumerate(taken):
        splits = min(i + 1, len(shares) - 1)
        allowed = Fraction(splits, 2) + splits * Fraction(
            n + 1, PARTS
        )  # shares are rounded to PARTS
        assert abs(count - n * Fraction(shares[i]) / whole) <= allowed, (n, i, count)


@pytest.mark.parametrize("shares", SHARES, ids=str)
def test_every_prefix_has_its_shares(shares: list[float]) -> None:
    """With two or three members to within one item a member; more splits may cost half an item
    each."""
    taken, whole = [0] * len(shares), sum(shares)
    for index in range(5000):
        taken[blend_place(index, shares)[0]] += 1
        assert_fair(taken, index + 1, shares)
        for count, share in zip(taken, shares, strict=True):
            allowed = max(1, (len(shares) - 1) / 2)
            assert abs(count - (index + 1) * share / whole) <= allowed + 1e-5, (index, taken)


@examples
@given(some_shares, st.integers(1, 400))
def test_any_shares(shares: list[float], n: int) -> None:
    places = [blend_place(index, shares) for index in range(n)]
    assert_fair(counts(places, len(shares)), n, shares)
    for i in range(len(shares)):
        assert [own for member, own in places if member == i] == list(
            range(counts(places, len(shares))[i])
        )


@pytest.mark.parametrize("shares", SHARES, ids=str)
def test_each_member_counts_up_without_gap(shares: list[float]) -> None:
    following = [0] * len(shares)
    for index in range(5000):
        member, own = blend_place(index, shares)
        assert own == following[member]
        following[member] += 1
    assert all(following)


@pytest.mark.parametrize("shares", SHARES, ids=str)
@pytest.mark.parametrize("start", [10**12, (1 << 53) - 500, 10**17 + 7])
def test_exact_at_huge_indices(shares: list[float], start: int) -> None:
    """Beyond 2^53, where a float cannot count any more: no gap, no item twice, and the shares still
    hold."""
    following: dict[int, int] = {}
    for index in range(start, start + 3000):
        member, own = blend_place(index, shares)
        assert own == following.get(member, own)
        following[member] = own + 1
    assert len(following) == len(shares)
    assert_fair([following[i] for i in range(len(shares))], start + 3000, shares)


@examples
@given(some_shares, st.integers(0, 1 << 61))
def test_neighbours_at_any_index(shares: list[float], index: int) -> None:
    """Two items in a row are two members' next ones, or one member's two."""
    (member, own), (other, next_) = blend_place(index, shares), blend_place(index + 1, shares)
    assert own >= 0 and (member != other or next_ == own + 1)


def test_the_scale_of_shares_does_not_matter() -> None:
    for shares, scaled in (([0.75, 0.25], [3, 1]), ([0.5, 0.25, 0.25], [8, 4, 4])):
        assert [blend_place(i, shares) for i in range(1000)] == [
            blend_place(i, scaled) for i in range(1000)
        ]


# ---- packs


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> list[PackedDataset]:
    """Three data sets of different sizes, so that their epochs end at different items; the second
    has weights."""
    root = tmp_path_factory.mktemp("blend")
    make_tokenizer().save_pretrained(str(root / "tokenizer"))
    members = []
    for i, (rows, extra) in enumerate(((9, {}), (20, {"weight": 0.5}), (31, {}))):
        prepare(
            write_rows(root / f"{i}.jsonl", rows, i, **extra),
            root / "tokenizer",
            root / str(i),
            progress=False,
        )
        data = PreparedData.load(root / str(i))
        members.append(PackedDataset(data, seq_length=48, global_batch_size=1, seed=1))
    return members


SPLIT = [0.2, 0.5, 0.3]


def test_items_are_the_members_own(parts: list[PackedDataset]) -> None:
    blend = BlendedPacks(parts, SPLIT)
    following = [0, 0, 0]
    for index in range(60):  # several epochs of each
        item = blend[index]
        member = int(item["dataset"])
        assert member == blend_place(index, SPLIT)[0]
        own = parts[member][following[member]]
        assert item.keys() == own.keys() | {"dataset"}
        assert all(torch.equal(item[name], own[name]) for name in own if name != "index")
        assert (
            int(item["index"]) == index
            and item["dataset"].dtype == torch.int64
            and item["dataset"].dim() == 0
        )
        assert (item["labels"] != -100).any()  # with global_batch_size=1 no pack is masked
        following[member] += 1
    assert all(count > part.packs_per_epoch for count, part in zip(following, parts, strict=True))
    assert len(blend) == len(parts[0])


def test_random_access_equals_sequential(parts: list[PackedDataset]) -> None:
    blend, other = BlendedPacks(parts, SPLIT), BlendedPacks(parts, SPLIT)
    sequential = [blend[index] for index in range(40)]
    for index in (39, 0, 17, 5, 38, 17):
        item = other[index]
        assert all(torch.equal(item[name], sequential[index][name]) for name in sequential[index])
    assert other[10**12]["tokens"].shape == (48,)


def test_supervised_tokens_are_those_of_the_item(parts: list[PackedDataset]) -> None:
    packs = BlendedPacks(parts, [0.5, 0.3, 0.2][: len(parts)])
    for index in range(30):
        assert packs.supervised_tokens(index) == int((packs[index]["labels"] != -100).sum())


def test_messages_name_the_members_pack(parts: list[PackedDataset]) -> None:
    blend = BlendedPacks(parts, SPLIT)
    for index in (0, 1, 2, 33):
        member, own = blend_place(index, SPLIT)
        text = blend.where(index)
        assert text == parts[member].where(own)
        assert text.startswith(f"pack {own} of {Path(parts[member].data.directory)}, sample_ids ")


def test_a_micro_batch_says_where_each_token_comes_from(parts: list[PackedDataset]) -> None:
    dressed = [
        part.with_teacher(None, True) for part in parts
    ]  # all with weights, so that they stack
    blend = BlendedPacks(dressed, SPLIT)
    items = [blend[index] for index in range(4)]
    batch = MicroBatch.from_packs(default_collate(items), "cpu")
    assert batch.dataset_ids is not None and batch.token_weights is not None
    members = [blend_place(index, SPLIT)[0] for index in range(4)]
    assert len(set(members)) > 1
    assert batch.dataset_ids.tolist() == [[member for member in members for _ in range(48)]]
    assert batch.index == [0, 1, 2, 3] and torch.equal(
        batch.tokens[0], torch.cat([item["tokens"] for item in items])
    )
    supervised = batch.labels != -100
    for member, weight in enumerate((1.0, 0.5, 1.0)):
        chosen = batch.token_weights[supervised & (batch.dataset_ids == member)]
        assert (chosen == weight).all()
