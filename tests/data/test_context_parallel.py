"""What each context-parallel rank holds: Megatron's own cut, document by document, and nothing
lost."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_tsft.data.batch import MicroBatch
from megatron_tsft.data.context_parallel import gathered_order, positions_on_rank

SIZES = st.sampled_from([1, 2, 3, 4])
CHUNKS = st.lists(st.integers(1, 7), min_size=1, max_size=6)


@given(size=SIZES, chunks=CHUNKS)
def test_every_position_is_on_one_rank(size: int, chunks: list[int]) -> None:
    lengths = [2 * size * n for n in chunks]
    held = [positions_on_rank(lengths, rank, size) for rank in range(size)]
    assert {len(part) for part in held} == {sum(lengths) // size}
    assert sorted(torch.cat(held).tolist()) == list(range(sum(lengths)))
    assert all((part[1:] > part[:-1]).all() for part in held)  # in the documents' order
    values = torch.arange(sum(lengths)) * 3
    shards = torch.cat([values[part] for part in held])
    assert torch.equal(shards[gathered_order(lengths, size)], values)


@given(size=SIZES, chunks=CHUNKS)
def test_it_is_megatrons_cut(size: int, chunks: list[int]) -> None:
    """Megatron's cut of a whole sequence, of each document; and the rows of the rotary table that
    Megatron takes."""
    from megatron.core.models.common.embeddings.rope_utils import _get_thd_freqs_on_this_cp_rank

    lengths = [2 * size * n for n in chunks]
    table = torch.arange(max(lengths))
    for rank in range(size):
        ours = positions_on_rank(lengths, rank, size)
        theirs, frequencies, start = [], [], 0
        for length in lengths:
            theirs.append(megatrons_cut(torch.arange(start, start + length), rank, size))
            frequencies.append(
                _get_thd_freqs_on_this_cp_rank(rank, size, torch.empty(length // size), table)
            )
            start += length
        assert torch.equal(ours, torch.cat(theirs))
        within = torch.cat([torch.arange(length) for length in lengths])
        assert torch.equal(within[ours], torch.cat(frequencies))


def megatrons_cut(sequence: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    """What megatron/core/utils.py gives a rank of one sequence; it asks torch.distributed only for
    rank and size."""
    from megatron.core.utils import _get_batch_on_this_cp_rank_per_sequence_balancing

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.distributed, "get_world_size", lambda group: group.size)
        patch.setattr(torch.distributed, "get_rank", lambda group: group.rank)
        group: Any = SimpleNamespace(size=size, rank=rank)
        return _get_batch_on_this_cp_rank_per_sequence_balancing({"tokens": sequence[None]}, group)[
            "tokens"
        ][0]


def test_a_document_that_cannot_be_cut() -> None:
    with pytest.raises(
        ValueError, match="a document of 6 positions cannot be cut into 4 chunks for 2 ranks"
    ):
        positions_on_rank([8, 6, 8], 0, 2)


def packs(documents: list[list[int]], k: int = 3) -> dict[str, torch.Tensor]:
    """Stacked items with every tensor that a PackedDataset can give, each value telling its
    place."""
    shape = (len(documents), sum(documents[0]))
    place = torch.arange(shape[0] * shape[1]).reshape(shape)
    positions = torch.stack(
        [torch.from_numpy(np.concatenate([np.arange(n) for n in lengths])) for lengths in documents]
    )
    return {
        "tokens": place,
        "labels": place + 1000,
        "position_ids": positions,
        "token_weights": place / 7,
        "teacher_ids": (place[..., None] * k + torch.arange(k)).int(),
        "teacher_logprobs": -(place[..., None] * k + torch.arange(k)).half(),
        "teacher_label_logp": -place.half(),
        "teacher_tail_logmass": -place.float(),
        "dataset": torch.arange(shape[0]),
        "index": torch.arange(shape[0]),
    }


def test_all_tensors_of_a_batch_are_cut_alike() -> None:
    stacked = packs([[16, 8, 24], [8, 40]])
    whole = MicroBatch.from_packs(stacked, "cpu")
    assert whole.teacher is not None
    for rank in range(2):
        part = MicroBatch.from_packs(stacked, "cpu", context_rank=rank, context_size=2)
        held = positions_on_rank([16, 8, 24, 8, 40], rank, 2)
        assert (
            part.lengths == whole.lengths and part.num_sequences == 5 and part.index == whole.index
        )
        names = ("tokens", "labels", "position_ids", "token_weights", "sequence_ids", "dataset_ids")
        for name in names:
            assert torch.equal(getattr(part, name), getattr(whole, name)[:, held]), name
        assert part.teacher is not None
        for name in ("ids", "logprobs", "label_logp", "tail_logmass"):
            assert torch.equal(
                getattr(part.teacher, name), getattr(whole.teacher, name)[:, held]
            ), name
