"""The LM head inside the loss: logits exist only for a range of vocabulary columns at a time.

A chunk of columns is a shard like any other, so its statistics merge with the others' as ranks' do.
Chunks of columns, not of tokens, because of what accumulates: each chunk's part of the weight's
gradient is whole at once and rounded once, and only hidden's gradient is summed over chunks, in
fp32; chunks of tokens would sum the weight's, [V/tp, H].

Budget: four matrix products of the head (forward, once more in backward, and two gradients) where a
plain head has three. One all-gather of statistics over TP forward; backward one all-reduce of
hidden's gradient. Under sequence parallel hidden is gathered in both and its gradient
reduce-scattered, as in Megatron's own head (megatron/core/tensor_parallel/layers.py:530-760,
0.19.2). Kept for backward: hidden and weight by reference.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_tsft.loss.collectives import all_gather, reduce_scatter
from megatron_tsft.loss.dispatch import implementation
from megatron_tsft.loss.problem import Problem
from megatron_tsft.loss.records import QTargetOutput
from megatron_tsft.loss.shard import Shard
from megatron_tsft.loss.statistics import combine, merge
from megatron_tsft.loss.targets import (
    Targets,
    decide_targets,
    gradient_weights,
    keep_for_backward,
    output_fields,
)
from megatron_tsft.loss.teacher import HiddenTeacher

# a chunk is about this share of the logits: with the fp32 sum under a tenth of them at V/tp >= 30 H
CHUNKS = 48
MIN_COLUMNS = 256  # narrower products waste the hardware
ALIGNMENT = 128  # columns; rows at odd addresses cost matrix products and kernels their wide loads


def linear_q_target(
    problem: Problem, hidden: Tensor, weight: Tensor, sequence_parallel: bool, shape: torch.Size
) -> QTargetOutput:
    """Run the loss on hidden [..., H] and weight [V/tp, H]; results in the labels' `shape`."""
    box: list[Targets] = []
    loss: Tensor = _LinearQTarget.apply(hidden, weight, problem, sequence_parallel, box)  # type: ignore[assignment]
    return QTargetOutput(loss=loss.view(shape), **output_fields(box[0], shape))


class _LinearQTarget(torch.autograd.Function):
    """loss [N] from hidden [..., H] and weight [V/tp, H]; other values leave through `box`."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        problem: Problem,
        sequence_parallel: bool,
        box: list[Targets],
    ) -> Tensor:
        head = Head(problem, hidden, weight, sequence_parallel)
        selection = problem.selection
        tables = [
            implementation(logits).local_statistics(shard, selection)
            for logits, shard in head.chunks()
        ]
        local = combine(
            tables[0].names, torch.stack([table.data for table in tables]), problem.a, problem.b
        )
        merged = merge(local, problem.a, problem.b, problem.tp_group)
        targets = decide_targets(problem, merged)
        box.append(targets)
        # backward reads it for pi alone
        ctx.problem = problem if problem.has_pi else replace(problem, teacher=None)
        ctx.sequence_parallel = sequence_parallel
        ctx.names, numbers = keep_for_backward(problem, merged, targets)
        ctx.save_for_backward(hidden, weight, *numbers)
        return targets.loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        hidden, weight, *numbers = ctx.saved_tensors
        problem: Problem = ctx.problem
        weights = gradient_weights(
            problem.scale, dict(zip(ctx.names, numbers, strict=True)), grad_output
        )
        head = Head(problem, hidden, weight, ctx.sequence_parallel)
        grad_hidden = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_hidden = torch.zeros(
                head.hidden.shape, dtype=weights.m.dtype, device=hidden.device
            )
        if ctx.needs_input_grad[1]:
            grad_weight = WeightGradient(weight)
        for logits, shard in head.chunks():
            implementation(logits).write_gradient(shard, weights, logits)
            rows = slice(shard.start, shard.start + logits.shape[1])
            if grad_hidden is not None:
                add_product(grad_hidden, logits, weight[rows])
            if grad_weight is not None:
                grad_weight.add(rows, logits, head.hidden)
        return (
            None if grad_hidden is None else head.reduced(grad_hidden.to(hidden.dtype)),
            None if grad_weight is None else grad_weight.for_autograd(),
            None,
            None,
            None,
        )


class Head:
    """Hidden states [N, H], gathered under sequence parallel, times this rank's weight, some
    columns at a time."""

    def __init__(self, problem: Problem, hidden: Tensor, weight: Tensor, sequence_parallel: bool):
        self.problem, self.weight, self.group = problem, weight, problem.tp_group
        self.shape, self.sequence_parallel = hidden.shape, sequence_parallel
        self.hidden = self._gathered(hidden).reshape(-1, hidden.shape[-1])
        if sequence_parallel and isinstance(problem.teacher, HiddenTeacher):
            teacher = replace(problem.teacher, hidden=self._gathered(problem.teacher.hidden))
            self.problem = replace(problem, teacher=teacher)

    def _gathered(self, hidden: Tensor) -> Tensor:
        if not self.sequence_parallel:
            return hidden
        assert self.group is not None
        return all_gather(hidden, self.group).flatten(0, 1)

    def chunks(self) -> Iterator[tuple[Tensor, Shard]]:
        """(logits [N, columns], their shard), one after the other in the same memory."""
        n, width = len(self.hidden), len(self.weight)
        step = min(width, max(MIN_COLUMNS, -(-width // (CHUNKS * ALIGNMENT)) * ALIGNMENT))
        memory = self.hidden.new_empty(n * step)
        for start in range(0, width, step):
            columns = min(step, width - start)
            logits = memory[: n * columns].view(n, columns)
            torch.mm(self.hidden, self.weight[start : start + columns].T, out=logits)
            yield logits, self.problem.shard(logits, start)

    def reduced(self, grad: Tensor) -> Tensor:
        """hidden's gradient [..., H] for autograd, from each rank's part of the sum [N, H]."""
        if self.group is None or self.group.size() == 1:
            return grad.view(self.shape)
        if not self.sequence_parallel:
            dist.all_reduce(grad, group=self.group)
            return grad.view(self.shape)
        return reduce_scatter(grad, self.group).view(self.shape)


class WeightGradient:
    """Where the weight's gradient goes: Megatron's fp32 `main_grad` if it has one, or a tensor."""

    def __init__(self, weight: Tensor):
        self.weight = weight
        self.main = hasattr(weight, "main_grad") and hasattr(weight, "grad_added_to_main_grad")
        self.sum: Tensor = weight.main_grad if self.main else torch.zeros_like(weight)  # type: ignore[attr-defined]

    def add(self, rows: slice, grad_logits: Tensor, hidden: Tensor) -> None:
        """The whole gradient of these rows: grad_logits [N, columns], hidden [N, H]."""
        add_product(self.sum[rows], grad_logits.T, hidden)

    def for_autograd(self) -> Tensor:
        """The gradient, or a placeholder for one that is in `main_grad` already (layers.py:692-721,
        0.19.2)."""
        if not self.main:
            return self.sum
        self.weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
        # zeros where Megatron adds it all the same, because an embedding shares the weight
        make = (
            torch.zeros_like if getattr(self.weight, "zero_out_wgrad", False) else torch.empty_like
        )
        return make(self.weight, requires_grad=False)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b in total's type; on the CPU a narrower product is rounded first, which halves
    its time."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.add_(a @ b)
