"""The one hook into GPTModel: hidden states in, per-token loss and metrics out (`output_processor=`).

Runs on the last pipeline stage only (megatron/core/models/gpt/gpt_model.py:719, 0.19.2).
"""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tsft.data.batch import MicroBatch
from megatron_tsft.loss import q_target_cross_entropy
from megatron_tsft.objectives import Objective

TRAINING_METRICS = ("loss", "nll", "gamma", "entropy", "kl", "supervised")
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
    teacher_logits: Tensor | None = field(default=None)  # [s, b, V/tp], put here by the riding teacher

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
    """[len(context.metrics), b, s] fp32: the loss first (differentiable), detached metrics after."""
    logits, _ = output_layer(hidden_states, weight=output_weight)  # [s, b, V/tp]
    logits = scale_logits(logits)
    batch, objective = context.batch, context.objective
    sequences = "sequence_log_ratio" in objective.needs
    out = q_target_cross_entropy(
        logits,
        labels.transpose(0, 1),
        objective,
        teacher=context.teacher_logits,
        token_weights=None if batch.token_weights is None else batch.token_weights.transpose(0, 1),
        sequence_ids=batch.sequence_ids.transpose(0, 1) if sequences else None,
        num_sequences=batch.num_sequences if sequences else None,
        diagnostics=("entropy", "kl") if context.training else (),
        tp_group=context.tp_group,
        cp_group=context.cp_group,
        vocab_size=context.vocab_size,
        inplace=torch.is_grad_enabled(),  # nobody reads the logits again: the gradient takes their memory
    )
    context.teacher_logits = None
    values = {
        "loss": out.loss,
        "nll": out.nll,
        "gamma": out.imitation,
        "entropy": out.entropy,
        "kl": out.kl,
        "supervised": out.supervised.to(out.loss.dtype),
    }
    rows: list[Tensor] = [values[name] for name in context.metrics]  # type: ignore[misc]  # those asked for are there
    return torch.stack(rows).transpose(1, 2).contiguous()
