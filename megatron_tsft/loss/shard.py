"""A shard: some of the vocabulary's columns for N tokens; a rank holds one or several."""

from dataclasses import dataclass

from torch import Tensor

from megatron_tsft.loss.teacher import DenseTeacher, SparseTeacher
from megatron_tsft.objectives import Scalar


@dataclass(frozen=True)
class Shard:
    """Some columns of the vocabulary.

    Attributes:
        start: the first one, counted from this rank's first.
        logits: [N, width], any strides; z = scale * logits.
        columns: how many of them are real; the others are padding.
        label: [N] int64, the label's column here, -1 where it lies elsewhere.
        active: [N] bool; other tokens are neither read nor computed.
        a, b: pi = softmax(a * z + b * log T); numbers, 0-dim or [N] tensors.
        teacher: log T on the same columns.
    """

    start: int
    logits: Tensor
    columns: int
    scale: float
    label: Tensor
    active: Tensor
    a: Scalar
    b: Scalar
    teacher: DenseTeacher | SparseTeacher | None


@dataclass(frozen=True)
class GradientWeights:
    """dloss/dlogits of a shard in per-token numbers, [N] each, in the working type:

        p * e^(z - m) - pi * e^(u - m_pi),   u = a (z - m) + b (log T - m_t)

    with `label` in the label's own column, and zero for tokens that are not active.
    """

    active: Tensor  # bool
    m: Tensor
    p: Tensor
    label: Tensor
    m_pi: Tensor | None
    pi: Tensor | None  # None: no residual, or one that is p itself
    m_t: Tensor | None  # None: no dense teacher
