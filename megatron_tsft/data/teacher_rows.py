"""What a teacher said about one conversation, as packs carry it."""

from collections.abc import Mapping, Sized
from dataclasses import dataclass, fields
from typing import Protocol

import numpy as np

from megatron_tsft.loss.records import TeacherRecords

# of one conversation's n supervised tokens, in their order: ids [n, k] int32, logprobs [n, k] and
# label_logp [n] float16, tail_logmass [n] float32
TeacherRows = TeacherRecords[np.ndarray]
PREFIX = "teacher_"  # before a field's name, in a pack


def absent_rows(n: int, top_k: int) -> TeacherRows:
    """Records of n tokens about which no teacher said anything."""
    return TeacherRecords(
        ids=np.full((n, top_k), -1, np.int32),
        logprobs=np.full((n, top_k), -np.inf, np.float16),
        label_logp=np.full(n, -np.inf, np.float16),
        tail_logmass=np.full(n, -np.inf, np.float32),
    )


def put_rows(into: TeacherRows, places: np.ndarray, rows: TeacherRows, first: int = 0) -> None:
    """Write the records of `rows` from `first` on to `places` [m] int of `into`, one to each."""
    part = slice(first, first + len(places))
    into.ids[places] = rows.ids[part]
    into.logprobs[places] = rows.logprobs[part]
    into.label_logp[places] = rows.label_logp[part]
    into.tail_logmass[places] = rows.tail_logmass[part]


def to_pack[Array: Sized](records: TeacherRecords[Array]) -> dict[str, Array]:
    """The arrays by the names that they have in a pack: teacher_ids, teacher_logprobs, ..."""
    return {PREFIX + field.name: getattr(records, field.name) for field in fields(records)}


def from_pack[Array: Sized](pack: Mapping[str, Array]) -> TeacherRecords[Array] | None:
    """The records of a pack; None where it carries none."""
    if PREFIX + "ids" not in pack:
        return None
    return TeacherRecords(
        **{field.name: pack[PREFIX + field.name] for field in fields(TeacherRecords)}
    )


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
