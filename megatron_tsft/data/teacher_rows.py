"""What a teacher said about one conversation, as packs carry it; where it comes from is teacher/'s
business."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np


@dataclass(frozen=True)
class TeacherRows:
    """The teacher at the n supervised tokens of a conversation, in their order.

    Attributes:
        ids: [n, k] int32, the k most likely tokens, most likely first; no id twice in a row.
        logprobs: [n, k] float16, log T at `ids`.
        label_logprobs: [n] float16, log T(y) of the token that the conversation has there.
        tail_logmass: [n] float32, log of the mass of all other tokens; -inf where there are none.
    """

    ids: np.ndarray
    logprobs: np.ndarray
    label_logprobs: np.ndarray
    tail_logmass: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)


class TeacherSource(Protocol):
    """Teacher rows of a prepared data set, by its row numbers."""

    @property
    def top_k(self) -> int:
        """k of every record."""
        ...

    def rows(self, index: int) -> TeacherRows | None:
        """The records of conversation `index`; None where nobody will read them."""
        ...


@dataclass(frozen=True)
class Untaught:
    """A data set whose objective reads no teacher, beside others in one batch: room for records,
    and none in it."""

    top_k: int

    def rows(self, index: int) -> None:
        """None."""
