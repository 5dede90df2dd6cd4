"""Lays conversations end to end: labels are shifted inside each, positions count from 0 in each."""

from collections.abc import Sequence

import numpy as np

from megatron_tsft.data.prepared import Sample

IGNORED = -100


class PackWriter:
    """One pack of `size` positions while it is filled."""

    def __init__(self, size: int):
        self._tokens = np.zeros(size, np.int64)
        self._labels = np.full(size, IGNORED, np.int64)
        self._positions = np.zeros(size, np.int64)
        self._at = 0

    def add(self, input_ids: np.ndarray, loss_mask: np.ndarray, room: int | None = None) -> slice:
        """Append a conversation; returns the places of its labels.

        Args:
            input_ids: [n] tokens, of which the last one is only a label.
            loss_mask: [n] bool, which of them are supervised.
            room: positions that it takes, at least n - 1; the rest of them is padding.
        """
        count = len(input_ids) - 1
        room = max(count, 1) if room is None else room
        place = slice(self._at, self._at + count)
        self._tokens[place] = input_ids[:-1]
        self._labels[place] = np.where(loss_mask[1:], input_ids[1:], IGNORED)
        self._positions[self._at : self._at + room] = np.arange(room)
        self._at += room
        return place

    def arrays(self) -> dict[str, np.ndarray]:
        """The pack, [size] int64 each: tokens, 0 where nothing lies; labels, the next token of the
        same conversation, IGNORED where it is not supervised; position_ids, in which what is left
        at the end is a document of its own."""
        self._positions[self._at :] = np.arange(len(self._positions) - self._at)
        return {"tokens": self._tokens, "labels": self._labels, "position_ids": self._positions}


def write_pack(samples: Sequence[Sample], size: int) -> dict[str, np.ndarray]:
    """Whole conversations, one after the other, in a pack of `size` positions."""
    pack = PackWriter(size)
    for sample in samples:
        pack.add(sample.input_ids, sample.loss_mask)
    return pack.arrays()
