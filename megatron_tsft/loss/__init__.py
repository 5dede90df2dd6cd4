"""Q-target losses on vocabulary-sharded logits, their dense definition, their statistics."""

from megatron_tsft.loss.api import q_target_cross_entropy, q_target_linear_cross_entropy
from megatron_tsft.loss.problem import LossOptions
from megatron_tsft.loss.records import QTargetOutput, TeacherHidden, TeacherRecords, TeacherTopK

__all__ = [
    "LossOptions",
    "QTargetOutput",
    "TeacherHidden",
    "TeacherRecords",
    "TeacherTopK",
    "q_target_cross_entropy",
    "q_target_linear_cross_entropy",
]
