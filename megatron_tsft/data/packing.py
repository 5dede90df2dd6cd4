"""Which conversations share a pack: first-fit decreasing, by their lengths, anew every epoch."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class EpochPlan:
    """The packs of one epoch: pack i holds rows[starts[i] : starts[i + 1]] of the data set."""

    rows: Ints  # [number of conversations]
    starts: Ints  # [packs + 1]

    def __len__(self) -> int:
        return len(self.starts) - 1

    def pack(self, index: int) -> Ints:
        """The data-set rows of one pack, in their order."""
        return self.rows[self.starts[index] : self.starts[index + 1]]


def first_fit_decreasing(lengths: Ints, capacity: int) -> Ints:
    """The bin of each item where items, longest first, go into the first bin that has room.

    All items of one length are placed together (each bin takes as many as fit before the next one
    gets any, which is what placing them one by one does), so the work is a few numpy calls for each
    distinct length.

    Args:
        lengths: [n] in descending order, each from 1 to `capacity`.
        capacity: room of a bin.

    Returns:
        [n] bin numbers from 0; how many bins there are depends on the multiset of lengths only.
    """
    bins = np.empty(len(lengths), dtype=np.int64)
    if not len(lengths):
        return bins
    values, first, counts = np.unique(-lengths, return_index=True, return_counts=True)
    smallest = -values[-1]
    open_bins, room, made = np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64), 0
    for length, start, count in zip(-values, first, counts, strict=True):
        fits = room // length
        before = np.cumsum(fits) - fits
        taken = np.clip(count - before, 0, fits)
        placed = int(taken.sum())
        bins[start : start + placed] = np.repeat(open_bins, taken)
        room = room - taken * length
        left, per_bin = count - placed, capacity // length
        if left:
            new = -(-left // per_bin)
            fresh = np.full(new, per_bin)
            fresh[-1] = left - (new - 1) * per_bin
            numbers = np.arange(made, made + new)
            bins[start + placed : start + count] = np.repeat(numbers, fresh)
            open_bins = np.concatenate([open_bins, numbers])
            room = np.concatenate([room, capacity - fresh * length])
            made += new
        useful = room >= smallest
        open_bins, room = open_bins[useful], room[useful]
    return bins


def plan_epoch(lengths: Ints, capacity: int, seed: int, epoch: int) -> EpochPlan:
    """The packs of an epoch: `seed` and `epoch` decide which equally long rows go together and the
    packs' order.

    Args:
        lengths: [n] positions that each row takes, from 1 to `capacity`.
        capacity: positions of a pack (seq_length).
    """
    random = np.random.default_rng([seed, epoch])
    shuffled = random.permutation(len(lengths))
    order = shuffled[np.argsort(-lengths[shuffled], kind="stable")]
    bins = first_fit_decreasing(lengths[order], capacity)
    packs = int(bins.max()) + 1 if len(bins) else 0
    place = random.permutation(packs)[bins]  # the packs' order in the epoch
    by_pack = np.argsort(place, kind="stable")
    starts = np.concatenate([[0], np.cumsum(np.bincount(place, minlength=packs))]).astype(np.int64)
    return EpochPlan(order[by_pack], starts)
