"""megatron-tsft: fine-tuning by target-distribution design (arXiv 2606.11189) for Megatron-Core."""

from megatron_tsft import objectives
from megatron_tsft.loss import (
    QTargetOutput,
    TeacherHidden,
    TeacherTopK,
    q_target_cross_entropy,
    q_target_linear_cross_entropy,
)

__version__ = "0.1.0"
__all__ = [
    "QTargetOutput",
    "TeacherHidden",
    "TeacherTopK",
    "objectives",
    "q_target_cross_entropy",
    "q_target_linear_cross_entropy",
]
