"""The vocabulary-parallel Q-target loss on logits, with a hand-written gradient.

Budget: forward one all-gather over TP (iw-sft one all-reduce more, over CP), backward none. The
logits and a dense teacher are read once forward and once backward, the gradient is written once.
Kept for backward: both by reference and a dozen numbers per token, never a vocabulary-sized tensor.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_tsft.loss.dispatch import implementation
from megatron_tsft.loss.problem import Problem
from megatron_tsft.loss.records import QTargetOutput
from megatron_tsft.loss.statistics import merge
from megatron_tsft.loss.targets import (
    Targets,
    decide_targets,
    gradient_weights,
    keep_for_backward,
    output_fields,
)
from megatron_tsft.loss.token_chunks import gradient_buffer


class _QTarget(torch.autograd.Function):
    """loss [N] from logits [N, V/tp]; the detached values leave through `box`."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, problem: Problem, inplace: bool, box: list[Targets]
    ) -> Tensor:
        shard = problem.shard(logits)
        local = implementation(logits).local_statistics(shard, problem.selection)
        merged = merge(local, shard.a, shard.b, problem.tp_group)
        targets = decide_targets(problem, merged)
        box.append(targets)
        # The logits go through save_for_backward alone, so that autograd frees them after backward
        # though the loss may live on. The teacher cannot: autograd refuses to save tensors made
        # under torch.inference_mode.
        # backward reads it for pi alone
        ctx.problem = problem if problem.has_pi else replace(problem, teacher=None)
        ctx.inplace = inplace
        ctx.names, numbers = keep_for_backward(problem, merged, targets)
        ctx.save_for_backward(logits, *numbers)
        return targets.loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        logits, *numbers = ctx.saved_tensors
        problem: Problem = ctx.problem
        weights = gradient_weights(
            problem.scale, dict(zip(ctx.names, numbers, strict=True)), grad_output
        )
        grad = logits.detach() if ctx.inplace else gradient_buffer(logits)
        implementation(logits).write_gradient(problem.shard(logits), weights, grad)
        return grad, None, None, None


def vocab_parallel_q_target(
    problem: Problem, logits: Tensor, inplace: bool, shape: torch.Size
) -> QTargetOutput:
    """Run the loss on logits [N, V/tp]; results in the labels' `shape`."""
    box: list[Targets] = []
    loss: Tensor = _QTarget.apply(logits, problem, inplace, box)  # type: ignore[assignment]
    return QTargetOutput(loss=loss.view(shape), **output_fields(box[0], shape))
