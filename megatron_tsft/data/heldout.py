"""Which conversations are held out: an exact share of them, the same whatever their order.

A group of conversations (encoding.Outcome.group) is held out whole, so that no held-out one is
trained on, and the groups with the smallest hashes are.
"""

import pickle
from array import array
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from megatron_tsft.data.chat import Encoded
from megatron_tsft.errors import UserError


class HeldOut:
    """Conversations on disk, until all are known."""

    def __init__(self, path: Path, share: float) -> None:
        """path: of a file that is made. share: of the conversations, within (0, 1)."""
        self._file = path.open("w+b")
        self._share = share
        self._groups = array("Q")

    def add(self, group: int, row: Encoded) -> None:
        """One more conversation; group: 64 bits."""
        self._groups.append(group)
        pickle.dump(row, self._file, pickle.HIGHEST_PROTOCOL)

    @property
    def conversations(self) -> int:
        """How many there are."""
        return len(self._groups)

    def close(self) -> None:
        """Close the file; safe to call again."""
        self._file.close()

    def divided(self) -> Iterator[tuple[bool, Encoded]]:
        """(whether it is held out, conversation), in the order of `add`.

        Raises:
            UserError: one side would be empty.
        """
        groups = np.array(self._groups, np.uint64)
        kinds = len(np.unique(groups))
        if kinds < 2:
            raise UserError(
                f"--heldout {self._share:g}: the input has"
                + (f" {len(groups)} conversations, all alike" if kinds else " no conversation")
                + ", of which none can be held out"
            )
        ordered = np.sort(groups)
        place = min(max(round(self._share * len(groups)), 1), len(groups) - 1)
        # the last group that is held out, and with it all of its conversations
        bound = min(ordered[place - 1], np.unique(groups)[-2])
        self._file.seek(0)
        for group in groups:
            yield bool(group <= bound), pickle.load(self._file)  # what `add` wrote
