"""A teacher as one rank sees it: dense, top-k or hidden states, on a range of columns."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_tsft.loss.records import TeacherTopK

# Maxima start here, not at -inf: a shard without any valid
# column merges as 0 * exp(FLOOR - max) = 0, never as NaN.
FLOOR = -1e30


@dataclass(frozen=True)
class DenseTeacher:
    """`values` [N, width]: teacher logits or log-probs on a shard's columns, log T up to a constant
    per token."""

    values: Tensor

    def view(self, start: int, width: int) -> "DenseTeacher":
        """The teacher on columns [start, start + width)."""
        return DenseTeacher(self.values[:, start : start + width])


@dataclass(frozen=True)
class SparseTeacher:
    """A TeacherTopK, flattened to N tokens and sorted by id; log T up to a constant per token,
    counted from 0."""

    ids: Tensor  # [N, k] int64, ascending; padding comes last, beyond any vocabulary
    logprobs: Tensor  # [N, k]
    tail: Tensor  # [N] value of every token outside the top-k (-inf: none)
    at_label: Tensor  # [N] value at the label
    label_logp: Tensor  # [N] log T(y)
    not_finite: Tensor  # [N] bool: the row is no distribution

    def counted_from(self, first: int) -> "SparseTeacher":
        """The same with ids counted from column `first` of the vocabulary."""
        return replace(self, ids=self.ids - first)


@dataclass(frozen=True)
class HiddenTeacher:
    """A teacher before its head: its logits on this rank's columns are hidden @ weight.T, made a
    chunk at a time."""

    hidden: Tensor  # [N, Ht]
    weight: Tensor  # [V/tp, Ht]
    absent: Tensor | None = None  # [V/tp] bool: log T = -inf

    def view(self, start: int, width: int) -> DenseTeacher:
        """The teacher on columns [start, start + width)."""
        values = self.hidden.new_empty(len(self.hidden), width)
        # into a given tensor, which autocast leaves alone:
        # backward, outside of it, makes the same again
        torch.mm(self.hidden, self.weight[start : start + width].T, out=values)
        if self.absent is not None:
            values.masked_fill_(self.absent[start : start + width], -torch.inf)
        return DenseTeacher(values)


def sparse_teacher(
    teacher: TeacherTopK, labels: Tensor, vocab_size: int, dtype: torch.dtype
) -> SparseTeacher:
    """A top-k teacher, already flattened to [N, k], with global ids."""
    ids, logprobs = teacher.ids.long(), teacher.logprobs.to(dtype)
    present = (ids >= 0) & (ids < vocab_size)
    none = torch.full((), -torch.inf, dtype=dtype, device=ids.device)
    logprobs = torch.where(present, logprobs, none)
    top = logprobs.amax(-1) if ids.shape[1] else none.expand(ids.shape[0])
    not_finite = torch.isnan(top) | (top == torch.inf)
    mass = torch.logsumexp(logprobs, -1) if ids.shape[1] else top  # log of the top-k's mass
    if teacher.tail == "drop":
        tail, total = none.expand(ids.shape[0]), mass
        not_finite = not_finite | (top == -torch.inf)
    else:
        # 1 - sum p, from the log: expm1 keeps what a subtraction
        # would cancel; rounding may leave it a hair below 0
        missing = torch.log(-torch.expm1(mass.clamp(max=0)))
        tail_mass = missing if teacher.tail_logmass is None else teacher.tail_logmass.to(dtype)
        others = vocab_size - present.sum(-1)
        tail = torch.where(others > 0, tail_mass - torch.log(others.clamp(min=1).to(dtype)), none)
        total = torch.logaddexp(mass, torch.where(others > 0, tail_mass, none))
        not_finite = not_finite | torch.isnan(tail) | (tail == torch.inf) | (total == -torch.inf)
    here = present & (ids == labels[:, None])
    own = torch.where(here, logprobs, none)
    at_label = torch.where(here.any(-1), own.amax(-1) if ids.shape[1] else none, tail)
    ids, order = torch.where(present, ids, torch.iinfo(torch.int64).max // 2).sort(-1)
    return SparseTeacher(
        ids, logprobs.gather(-1, order), tail, at_label, at_label - total, not_finite
    )
