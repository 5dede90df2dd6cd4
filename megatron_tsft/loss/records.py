"""The records that cross the loss's border: a teacher's top-k or hidden states in, per-token values
out."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor


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
    tail: Literal["uniform", "drop"] = "uniform"
    label_logprobs: Tensor | None = None
    tail_logmass: Tensor | None = None


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
