"""The vocabulary-parallel Q-target loss with a hand-written gradient.

    loss = c_y * CE(onehot(y), p) + c_r * CE(pi, p)
    dloss/dz = (c_y + c_r) * p - c_y * onehot(y) - c_r * pi          (c_y, c_r, pi detached)

Budget: forward two collectives over TP (MAX, SUM; eaft one all-gather more, iw-sft one SUM over CP), backward none.
Kept for backward: logits and teacher by reference and a dozen numbers per token, never a vocabulary-sized tensor.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_tsft.loss.diagnostics import target_kl
from megatron_tsft.loss.records import QTargetOutput
from megatron_tsft.loss.statistics import Merged, Shard, Wanted, local_statistics, merge, topk_entropy
from megatron_tsft.loss.teacher import FLOOR, DenseTeacher, SparseTeacher
from megatron_tsft.objectives import Coefficients, Objective, Statistics, as_like


@dataclass(frozen=True)
class Problem:
    """One call, validated and flattened to N tokens (api.py makes it)."""

    shard: Shard
    labels: Tensor  # [N] int64
    labelled: Tensor  # [N] bool: not ignored
    objective: Objective
    plan: Coefficients
    vocab_size: int
    reference_logprobs: Tensor | None  # [N]
    token_weights: Tensor | None  # [N]
    sequence_ids: Tensor | None  # [N] int64
    num_sequences: int
    diagnostics: frozenset[str]
    tp_group: "dist.ProcessGroup | None"
    cp_group: "dist.ProcessGroup | None"
    inplace: bool

    @property
    def has_residual(self) -> bool:
        return isinstance(self.plan.residual, Tensor) or self.plan.residual != 0

    @property
    def reads_teacher_label(self) -> bool:
        """log T(y) is needed and comes from the teacher."""
        needs = self.objective.needs
        from_teacher = self.reference_logprobs is None and needs & {"reference_logp_y", "sequence_log_ratio"}
        return "teacher_logp_y" in needs or bool(from_teacher)

    def wanted(self) -> Wanted:
        needs, dense = self.objective.needs, isinstance(self.shard.teacher, DenseTeacher)
        return Wanted(
            entropy="entropy" in needs or "entropy" in self.diagnostics,
            collision="collision" in needs,
            residual=self.has_residual,
            kl=self.has_residual and "kl" in self.diagnostics,
            teacher_logp=dense and self.reads_teacher_label,
            teacher_rows=dense,
            top_ks=self.objective.top_ks,
        )


@dataclass(frozen=True)
class Targets:
    """What the merged statistics say about each token, [N] each: the target's parts and what backward needs."""

    stats: Statistics
    imitation: Tensor
    residual: Tensor
    supervised: Tensor
    bad_teacher_rows: Tensor
    cross_entropy: Tensor | None  # CE(pi, p)


def decide_targets(problem: Problem, merged: Merged) -> Targets:
    """Named statistics -> coefficients of the objective; no host synchronisation."""
    sums, maxima, objective = merged.sums, merged.maxima, problem.objective
    log_s = torch.log(sums["s"])
    logp_y = (sums["z_y"] - maxima["m"]) - log_s
    stats = Statistics(logp_y=logp_y, p_y=logp_y.exp(), nll=-logp_y)
    if "e" in sums:
        stats["entropy"] = log_s - sums["e"] / sums["s"]
    if "c" in sums:
        stats["collision"] = sums["c"] / sums["s"].square()
    for k in objective.top_ks:
        assert merged.top is not None
        stats[f"topk_entropy_{k}"], count = topk_entropy(merged.top, k, problem.vocab_size)
        # at a vocabulary of one token the entropy is 0 and any positive log k gives the right 0
        stats[f"topk_log_k_{k}"] = torch.full_like(logp_y, max(count, 2.0)).log()
    bad = _teacher_statistics(problem, merged, stats)
    supervised = problem.labelled & ~bad
    if "sequence_log_ratio" in objective.needs:
        stats["sequence_log_ratio"] = _sequence_mean(problem, stats, supervised)

    coefficients = objective.coefficients(stats)
    zero = torch.zeros_like(logp_y)
    imitation, residual = (
        torch.where(supervised, as_like(c, zero), zero) for c in (coefficients.imitation, coefficients.residual)
    )
    cross_entropy = log_s - sums["d_pi"] / sums["s_pi"] if problem.has_residual else None
    return Targets(stats, imitation, residual, supervised, (bad & problem.labelled).sum(), cross_entropy)


def _teacher_statistics(problem: Problem, merged: Merged, stats: Statistics) -> Tensor:
    """Fill in log T(y) and log p_ref(y); return where a teacher that is used is not finite, [N] bool."""
    teacher, sums, maxima = problem.shard.teacher, merged.sums, merged.maxima
    bad = torch.zeros_like(problem.labelled)
    if isinstance(teacher, DenseTeacher):
        bad = (sums["bad"] > 0) | (maxima["m_t"] <= FLOOR)
        if "s_t" in sums:
            stats["teacher_logp_y"] = (sums["t_y"] - maxima["m_t"]) - torch.log(sums["s_t"])
    elif isinstance(teacher, SparseTeacher):
        bad, stats["teacher_logp_y"] = teacher.bad, teacher.label_logp
    reads = problem.objective.where_needs("teacher_logp_y", "reference_logp_y", "sequence_log_ratio")
    bad = bad & ((problem.shard.b != 0) | reads)  # a teacher that a token does not use may be anything
    if problem.reference_logprobs is not None:
        stats["reference_logp_y"] = problem.reference_logprobs
    elif isinstance(teacher, DenseTeacher) and "s_t" in sums:
        stats["reference_logp_y"] = stats["teacher_logp_y"]
    if "reference_logp_y" in stats:
        reference = stats["reference_logp_y"]
        reads = problem.objective.where_needs("reference_logp_y", "sequence_log_ratio")
        bad = bad | ((torch.isnan(reference) | (reference == torch.inf)) & reads)
        stats["reference_logp_y"] = reference.clamp(min=FLOOR)  # at -inf a weight of 0 could not remove the ratio
    return bad


def _sequence_mean(problem: Problem, stats: Statistics, supervised: Tensor) -> Tensor:
    """mean over each token's sequence of log p(y) - log p_ref(y), [N]; sequences may span CP ranks."""
    assert problem.sequence_ids is not None
    counted = supervised & ~torch.isnan(stats.reference_logp_y)  # in a mixture other tokens may have no reference
    ratio = torch.where(counted, stats.logp_y - stats.reference_logp_y, torch.zeros_like(stats.logp_y))
    values = torch.stack([ratio, counted.to(ratio.dtype)])  # [2, N]
    totals = torch.zeros(2, problem.num_sequences, dtype=ratio.dtype, device=ratio.device)
    totals.index_add_(1, problem.sequence_ids, values)
    if problem.cp_group is not None and problem.cp_group.size() > 1:
        dist.all_reduce(totals, group=problem.cp_group)
    return (totals[0] / totals[1].clamp(min=1))[problem.sequence_ids]


class _QTarget(torch.autograd.Function):
    """loss [N] from logits [N, V/tp]; the detached values leave through `box`."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, problem: Problem, box: dict[str, Tensor]) -> Tensor:
        shard = problem.shard
        merged = merge(local_statistics(shard, problem.wanted()), shard, problem.tp_group)
        targets = decide_targets(problem, merged)
        sums, maxima, stats = merged.sums, merged.maxima, targets.stats
        zero = torch.zeros_like(stats.logp_y)
        loss = targets.imitation * stats.nll
        if targets.cross_entropy is not None:
            loss = loss + targets.residual * targets.cross_entropy
        if problem.token_weights is not None:
            loss = loss * problem.token_weights
        loss = torch.where(targets.supervised, loss, zero)

        box.update(imitation=targets.imitation, residual=targets.residual, supervised=targets.supervised)
        box.update(nll=torch.where(targets.supervised, stats.nll, zero), bad_teacher_rows=targets.bad_teacher_rows)
        if "entropy" in problem.diagnostics:
            box["entropy"] = torch.where(targets.supervised, stats.entropy, zero)
        if "kl" in problem.diagnostics:
            pi_entropy = pi_logp_y = None
            if "k_pi" in sums:
                log_s_pi = torch.log(sums["s_pi"])
                pi_entropy = log_s_pi - sums["k_pi"] / sums["s_pi"]
                pi_logp_y = (sums["u_y"] - maxima["m_pi"]) - log_s_pi
            kl = target_kl(
                targets.imitation, targets.residual, stats.logp_y, targets.cross_entropy, pi_entropy, pi_logp_y
            )
            box["kl"] = torch.where(targets.supervised, kl, zero)

        weights = problem.token_weights if problem.token_weights is not None else torch.ones_like(zero)
        per_token = [maxima["m"], sums["s"], stats.logp_y, weights * targets.imitation, weights * targets.residual]
        if problem.has_residual:
            per_token += [maxima["m_pi"], sums["s_pi"]]
            if isinstance(shard.teacher, DenseTeacher):
                per_token.append(maxima["m_t"])
        # The logits go through save_for_backward alone, so that autograd frees them after backward though the loss may
        # live on. The teacher cannot: autograd refuses to save tensors made under torch.inference_mode.
        teacher = shard.teacher if problem.has_residual else None  # backward reads it for pi alone
        ctx.shard, ctx.inplace = replace(shard, logits=logits.new_empty(0), teacher=teacher), problem.inplace
        ctx.save_for_backward(logits, targets.supervised, *per_token)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        logits, supervised, m, s, logp_y, c_y, c_r, *pi_parts = ctx.saved_tensors
        shard: Shard = replace(ctx.shard, logits=logits)
        grad = logits.detach() if ctx.inplace else torch.empty_like(logits)
        grad[:, shard.columns :] = 0
        scale = grad_output.to(m.dtype) * shard.scale
        for rows in shard.chunks() if shard.columns else []:
            centred = shard.z(rows) - m[rows, None]
            label = shard.label[rows, None]
            p_y = logp_y[rows].exp()
            g = centred.exp().mul_(((c_y + c_r) / s)[rows, None])
            # the label's column from expm1, where p_y - 1 would cancel
            at_label = c_y[rows] * torch.expm1(logp_y[rows]) + c_r[rows] * p_y
            if pi_parts:
                m_pi, s_pi, *m_t = pi_parts
                log_t = shard.teacher.centred(rows, m_t[0][rows]) if isinstance(shard.teacher, DenseTeacher) else None
                pi = (shard.exponent(centred, log_t, rows) - m_pi[rows, None]).exp_().mul_((c_r / s_pi)[rows, None])
                at_label = at_label - pi.gather(1, label)[:, 0]
                g = g.sub_(pi)
            at_label = torch.where(shard.owns_label[rows], at_label, g.gather(1, label)[:, 0])
            g.scatter_(1, label, at_label[:, None])
            # masked, not multiplied: an ignored token's numbers, or a bad teacher row's, may be NaN
            g.mul_(scale[rows, None]).masked_fill_(~supervised[rows, None], 0)
            grad[rows, : shard.columns] = g.to(grad.dtype)
        return grad, None, None


def vocab_parallel_q_target(problem: Problem, shape: torch.Size) -> QTargetOutput:
    """Run the loss; results in the labels' `shape`."""
    box: dict[str, Tensor] = {}
    loss: Tensor = _QTarget.apply(problem.shard.logits, problem, box)  # type: ignore[assignment]
    counter = box.pop("bad_teacher_rows")
    return QTargetOutput(
        loss=loss.view(shape), bad_teacher_rows=counter, **{key: value.view(shape) for key, value in box.items()}
    )
