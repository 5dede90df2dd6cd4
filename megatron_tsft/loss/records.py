"""The records that cross the loss's border: a teacher goes in, per-token values come out."""

from collections.abc import Callable, Iterable, Sized
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Tail = Literal["uniform", "drop"]


@dataclass(frozen=True)
class TeacherRecords[Array: Sized]:
    """What a teacher's cache holds of some tokens, from the file to the loss: numpy arrays where
    data are read, tensors where they are used.

    Attributes:
        ids: [..., k] int32 (int64 where they are computed), the k most likely tokens, most likely
            first; -1 is padding; no id twice in a row.
        logprobs: [..., k] floating, log T at `ids`; float16 in a cache.
        label_logp: [...] floating, log T(y) of the token that the conversation has there; float16
            in a cache.
        tail_logmass: [...] float32, log of the mass of all other tokens; -inf where there are none.
    """

    ids: Array
    logprobs: Array
    label_logp: Array
    tail_logmass: Array

    def __len__(self) -> int:
        return len(self.ids)

    def map[Other: Sized](self, f: Callable[[Array], Other]) -> "TeacherRecords[Other]":
        """The same with `f` of each array: cut, transposed, moved."""
        return TeacherRecords(
            ids=f(self.ids),
            logprobs=f(self.logprobs),
            label_logp=f(self.label_logp),
            tail_logmass=f(self.tail_logmass),
        )

    @staticmethod
    def join[One: Sized, Other: Sized](
        parts: "Iterable[TeacherRecords[One]]", f: Callable[[list[One]], Other]
    ) -> "TeacherRecords[Other]":
        """Several as one, each array by `f` of the parts' (concatenated, stacked)."""
        parts = list(parts)
        return TeacherRecords(
            ids=f([part.ids for part in parts]),
            logprobs=f([part.logprobs for part in parts]),
            label_logp=f([part.label_logp for part in parts]),
            tail_logmass=f([part.tail_logmass for part in parts]),
        )


@dataclass(frozen=True)
class TeacherTopK:
    """A teacher known at its k most likely tokens.

    Attributes:
        ids: [..., k] int32 or int64, global token ids; -1 is padding; no id twice in a row.
        logprobs: [..., k] floating, log T at `ids`.
        tail: what the other tokens of the true vocabulary get: "uniform" spreads the missing mass
            evenly over them, "drop" gives them nothing (the top-k, renormalised).
        label_logprobs: [...] log T(y) where known: the reference of iw-sft and proximal.
        tail_logmass: [...] log of the missing mass where known; else log(1 - sum exp(logprobs)).
    """

    ids: Tensor
    logprobs: Tensor
    tail: Tail = "uniform"
    label_logprobs: Tensor | None = None
    tail_logmass: Tensor | None = None

    @staticmethod
    def of(records: TeacherRecords[Tensor], tail: Tail = "uniform") -> "TeacherTopK":
        """A cache's records as a teacher."""
        return TeacherTopK(
            records.ids, records.logprobs, tail, records.label_logp, records.tail_logmass
        )

    def map(self, f: Callable[[Tensor], Tensor]) -> "TeacherTopK":
        """The same with `f` of each tensor that is there."""
        label, mass = self.label_logprobs, self.tail_logmass
        return TeacherTopK(
            f(self.ids),
            f(self.logprobs),
            self.tail,
            None if label is None else f(label),
            None if mass is None else f(mass),
        )


@dataclass(frozen=True)
class TeacherHidden:
    """A teacher before its head, for the fused head: its logits hidden @ weight.T are never made
    whole.

    Attributes:
        hidden: [..., Ht], sharded on dim 0 where the student's is (sequence parallel).
        weight: [V/tp, Ht], this rank's rows, as many as the student's head has.
        absent: [V/tp] bool, columns that T gives nothing, or None.
    """

    hidden: Tensor
    weight: Tensor
    absent: Tensor | None = None


@dataclass(frozen=True)
class QTargetOutput:
    """Per-token results, each [...] in fp32 (fp64 for fp64 logits) and exactly 0 where `supervised`
    is False.

    Attributes:
        loss: c_y * nll + c_r * CE(pi, p), times token_weights; differentiable in the logits only.
        nll: -log p(y) of the scaled logits.
        imitation: c_y, the paper's gamma, before token_weights.
        residual: c_r, before token_weights.
        supervised: bool; False at ignored labels and where the teacher's row was not finite.
        bad_teacher_rows: int64 scalar tensor, how many labelled tokens had a teacher row that was
            not finite.
        entropy: H(p), or None unless asked for.
        kl: KL(Q || p) where Q is a distribution given by the statistics, NaN elsewhere; None unless
            asked for.
    """

    loss: Tensor
    nll: Tensor
    imitation: Tensor
    residual: Tensor
    supervised: Tensor
    bad_teacher_rows: Tensor
    entropy: Tensor | None = None
    kl: Tensor | None = None
