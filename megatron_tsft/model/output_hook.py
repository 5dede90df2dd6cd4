"""The one hook into GPTModel: hidden states in, per-token loss and metrics out
(`output_processor=`).

Runs on the last pipeline stage only (megatron/core/models/gpt/gpt_model.py:719, 0.19.2).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tsft.data.batch import MicroBatch
from megatron_tsft.loss import (
    LossOptions,
    QTargetOutput,
    TeacherHidden,
    TeacherTopK,
    q_target_cross_entropy,
    q_target_linear_cross_entropy,
)
from megatron_tsft.loss.checks import DIAGNOSTICS
from megatron_tsft.model.fused_head import head_weight
from megatron_tsft.objectives import Objective

TRAINING_METRICS = ("loss", "nll", "gamma", *DIAGNOSTICS, "supervised")
EVALUATION_METRICS = ("loss", "nll", "supervised")


@dataclass
class LossContext:
    """What one micro-batch's loss needs beside logits and labels (`output_processor_context=`)."""

    objective: Objective
    batch: MicroBatch
    vocab_size: int
    training: bool
    tp_group: "dist.ProcessGroup | None"
    cp_group: "dist.ProcessGroup | None"
    fuse_head: bool = False
    datasets: Sequence[str] = ()  # names of a mixture's data sets, numbered by batch.dataset_ids
    parameters: Mapping[str, Tensor] = field(
        default_factory=dict
    )  # scheduled ones by the name to log
    # put here by the riding teacher: logits [s, b, V/tp], or for a fused head what they are made of
    teacher: Tensor | TeacherHidden | None = field(default=None)

    @property
    def metrics(self) -> tuple[str, ...]:
        """The rows of the hook's output, in order."""
        return TRAINING_METRICS if self.training else EVALUATION_METRICS


def q_target_output(
    *,
    hidden_states: Tensor,  # [s/tp if sequence parallel else s, b, h]
    output_layer: Any,
    output_weight: Tensor | None,
    labels: Tensor,  # [b, s]
    context: LossContext,
    scale_logits: Any,
    **unused: Any,
) -> Tensor:
    """[len(context.metrics), b, s] fp32: the differentiable loss first, then the metrics."""
    batch, objective = context.batch, context.objective
    sequences = "sequence_log_ratio" in objective.needs
    teacher: Tensor | TeacherTopK | TeacherHidden | None = context.teacher
    if teacher is None and batch.teacher is not None:
        teacher = TeacherTopK.of(batch.teacher.map(lambda x: x.transpose(0, 1)), batch.teacher_tail)
    if not objective.reads_teacher:  # it may be there for another data set's objective
        teacher = None
    options = LossOptions(
        token_weights=None if batch.token_weights is None else batch.token_weights.transpose(0, 1),
        sequence_ids=batch.sequence_ids.transpose(0, 1) if sequences else None,
        num_sequences=batch.num_sequences if sequences else None,
        diagnostics=DIAGNOSTICS if context.training else (),
        tp_group=context.tp_group,
        cp_group=context.cp_group,
        vocab_size=context.vocab_size,
    )
    if context.fuse_head:
        # scale_logits is linear: on the number 1 it is the factor (muP's; 1 without)
        options["logit_scale"] = float(scale_logits(torch.ones(())))
        out = q_target_linear_cross_entropy(
            hidden_states,
            head_weight(output_layer, output_weight, hidden_states),
            labels.transpose(0, 1),
            objective,
            teacher,
            sequence_parallel=output_layer.sequence_parallel,
            **options,
        )
    else:
        # the riding teacher keeps hidden states for a fused head only
        assert not isinstance(teacher, TeacherHidden)
        logits, _ = output_layer(hidden_states, weight=output_weight)  # [s, b, V/tp]
        out = q_target_cross_entropy(
            scale_logits(logits),
            labels.transpose(0, 1),
            objective,
            teacher,
            # nobody reads the logits again: the gradient takes their memory
            inplace=torch.is_grad_enabled(),
            **options,
        )
    context.teacher = None
    rows = [metric_values(out, name) for name in context.metrics]
    return torch.stack(rows).transpose(1, 2).contiguous()


def metric_values(out: QTargetOutput, name: str) -> Tensor:
    """A metric of each token, [s, b] in the loss's type."""
    values: Tensor = getattr(out, "imitation" if name == "gamma" else name)
    return values.to(out.loss.dtype)
