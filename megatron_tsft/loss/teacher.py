"""One rank's view of a teacher, dense or top-k: its part of pi's exponent on this shard, and log T(y)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_tsft.loss.records import TeacherTopK
from megatron_tsft.objectives import Scalar

# Maxima start here, not at -inf: a shard without any valid column merges as 0 * exp(FLOOR - max) = 0, never as NaN.
FLOOR = -1e30


def rows_of(value: Scalar, rows: slice) -> Scalar:
    """A number or 0-dim tensor as it is; a per-token [N] tensor as the chunk's column [n, 1]."""
    return value[rows, None] if isinstance(value, Tensor) and value.dim() else value


def term(weight: Scalar, values: Tensor) -> Tensor | float:
    """weight * values with 0 * anything = 0, so that a zero weight removes -inf and NaN too."""
    if not isinstance(weight, Tensor):
        return 0.0 if weight == 0 else weight * values
    return torch.where(weight == 0, torch.zeros((), dtype=values.dtype, device=values.device), weight * values)


@dataclass(frozen=True)
class DenseTeacher:
    """`values` [N, V/tp]: teacher logits or log-probs, sharded as the student's; the first `columns` are real."""

    values: Tensor
    columns: int

    def chunk(self, rows: slice, dtype: torch.dtype) -> Tensor:
        return self.values[rows, : self.columns].to(dtype)

    def centred(self, rows: slice, m_t: Tensor) -> Tensor:
        """log T - m_t of a chunk up to a constant per token, [n, columns], in the type of m_t [n]."""
        return self.chunk(rows, m_t.dtype) - m_t[:, None]


@dataclass(frozen=True)
class SparseTeacher:
    """A TeacherTopK on this shard: `local` [N, k] columns, `columns` itself where the id lives elsewhere."""

    local: Tensor
    logprobs: Tensor  # [N, k], 0-mass entries at -inf
    tail: Tensor  # [N] log-prob of every token outside the top-k (-inf: none)
    label_logp: Tensor  # [N] log T(y) of the truncated teacher
    bad: Tensor  # [N] bool
    columns: int

    def exponent(self, az: Tensor | float, b: Scalar, rows: slice) -> Tensor:
        """az + b * log T, [n, columns]. The top-k columns are written over the tail's, never subtracted from a sum."""
        tail, local = term(b, self.tail[rows, None]), self.local[rows]
        # the last column takes foreign ids
        u = torch.empty(len(local), self.columns + 1, dtype=self.tail.dtype, device=self.tail.device)
        u[:, : self.columns] = az + tail
        az_k = torch.nn.functional.pad(az, (0, 1)).gather(1, local) if isinstance(az, Tensor) else az
        written = az_k + term(b, self.logprobs[rows])
        if isinstance(written, Tensor):  # a float only where a = b = 0: then every column is alike already
            u.scatter_(1, local, written.to(u.dtype))
        return u[:, : self.columns]


def sparse_teacher(
    teacher: TeacherTopK, labels: Tensor, *, offset: int, columns: int, vocab_size: int, dtype: torch.dtype
) -> SparseTeacher:
    """The part of a top-k teacher (already flattened to [N, k]) that concerns columns [offset, offset + columns)."""
    ids, logprobs = teacher.ids.long(), teacher.logprobs.to(dtype)
    present = (ids >= 0) & (ids < vocab_size)
    none = torch.full((), -torch.inf, dtype=dtype, device=ids.device)
    logprobs = torch.where(present, logprobs, none)
    top = logprobs.amax(-1) if ids.shape[1] else none.expand(ids.shape[0])
    bad = torch.isnan(top) | (top == torch.inf)
    mass = torch.logsumexp(logprobs, -1) if ids.shape[1] else top  # log of the top-k's mass
    if teacher.tail == "drop":
        tail, total = none.expand(ids.shape[0]), mass
        bad = bad | (top == -torch.inf)
    else:
        # 1 - sum p, from the log: expm1 keeps what a subtraction would cancel; rounding may leave it a hair below 0
        missing = torch.log(-torch.expm1(mass.clamp(max=0)))
        tail_mass = missing if teacher.tail_logmass is None else teacher.tail_logmass.to(dtype)
        others = vocab_size - present.sum(-1)
        tail = torch.where(others > 0, tail_mass - torch.log(others.clamp(min=1).to(dtype)), none)
        total = torch.logaddexp(mass, torch.where(others > 0, tail_mass, none))
        bad = bad | torch.isnan(tail) | (tail == torch.inf) | (total == -torch.inf)
    at_label = torch.where(present & (ids == labels[:, None]), logprobs, none)
    hit = (present & (ids == labels[:, None])).any(-1)
    label_logp = torch.where(hit, at_label.amax(-1) if ids.shape[1] else none, tail) - total
    local = ids - offset
    local = torch.where(present & (local >= 0) & (local < columns), local, columns)
    return SparseTeacher(local, logprobs, tail, label_logp, bad, columns)
