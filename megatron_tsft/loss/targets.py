"""From merged statistics to each token's target: coefficients, loss, reported values, and the
gradient's numbers.

    loss = c_y * CE(onehot(y), p) + c_r * CE(pi, p)
    dloss/dz = (c_y + c_r) * p - c_y * onehot(y) - c_r * pi          (c_y, c_r, pi detached)

Everything here is [N] numbers per token; the vocabulary is read elsewhere. No host synchronisation.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tsft.loss.diagnostics import target_kl
from megatron_tsft.loss.problem import Problem
from megatron_tsft.loss.shard import GradientWeights
from megatron_tsft.loss.statistics import Table, log_sum, student_statistics
from megatron_tsft.loss.teacher import FLOOR, SparseTeacher
from megatron_tsft.objectives import Scalar, Statistics, as_like


@dataclass(frozen=True)
class Targets:
    """Each token's target and what follows from it, [N] each."""

    loss: Tensor
    reported: dict[str, Tensor]  # fields of QTargetOutput beside the loss
    imitation: Tensor  # c_y, with token_weights
    residual: Tensor  # c_r, with token_weights
    logp_y: Tensor
    pi_logp_y: Tensor | None  # log pi(y); None without a pi of its own
    supervised: Tensor  # bool


def decide_targets(problem: Problem, merged: Table) -> Targets:
    """Merged statistics -> coefficients -> loss, reported values and what backward needs."""
    log_s = log_sum(merged)
    stats = student_statistics(merged, log_s, problem.objective.top_ks, problem.vocab_size)
    logp_y = stats.logp_y
    bad_teacher = _teacher_statistics(problem, merged, stats)
    supervised = problem.labelled & ~bad_teacher
    if "sequence_log_ratio" in problem.objective.needs:
        stats["sequence_log_ratio"] = _sequence_mean(problem, stats, supervised)

    coefficients = problem.objective.coefficients(stats)
    zero = torch.zeros_like(logp_y)

    def on_supervised(x: Scalar) -> Tensor:
        return torch.where(supervised, as_like(x, zero), zero)

    imitation = on_supervised(coefficients.imitation)
    residual = on_supervised(coefficients.residual)
    reported = {
        "imitation": imitation,
        "residual": residual,
        "nll": on_supervised(stats.nll),
        "supervised": supervised,
    }
    reported["bad_teacher_rows"] = (bad_teacher & problem.labelled).sum()
    for name in problem.diagnostics & stats.keys():
        reported[name] = on_supervised(stats[name])

    cross_entropy = pi_logp_y = pi_entropy = None  # of pi
    if problem.residual_is_p:
        cross_entropy = pi_entropy = stats.entropy
    elif problem.has_pi:
        cross_entropy, log_s_pi = log_s - merged["d_pi"] / merged["s_pi"], torch.log(merged["s_pi"])
        pi_logp_y = _exponent_at_label(problem, merged) - merged["m_pi"] - log_s_pi
        pi_entropy = log_s_pi - merged["k_pi"] / merged["s_pi"] if "k_pi" in merged else None
    if "kl" in problem.diagnostics:
        at_label = logp_y if problem.residual_is_p else pi_logp_y
        reported["kl"] = on_supervised(
            target_kl(imitation, residual, logp_y, cross_entropy, pi_entropy, at_label)
        )

    loss = imitation * stats.nll
    if cross_entropy is not None:
        loss = loss + torch.where(residual == 0, zero, residual * cross_entropy)
    if problem.token_weights is not None:
        loss, imitation, residual = (problem.token_weights * x for x in (loss, imitation, residual))
    return Targets(
        on_supervised(loss), reported, imitation, residual, logp_y, pi_logp_y, supervised
    )


def _exponent_at_label(problem: Problem, merged: Table) -> Tensor:
    """u = a (z - m) + b (log T - m_t) at the label, [N]."""

    def term(weight: Scalar, value: Tensor) -> Tensor:  # 0 * -inf = 0
        product = weight * value
        return product.masked_fill(as_like(weight, value) == 0, 0)

    u = term(problem.a, merged["z_y"] - merged["m"])
    if isinstance(problem.teacher, SparseTeacher):
        u = u + term(problem.b, problem.teacher.at_label)
    elif "t_y" in merged:
        u = u + term(problem.b, merged["t_y"] - merged["m_t"])
    return u.clamp(min=FLOOR)


def _teacher_statistics(problem: Problem, merged: Table, stats: Statistics) -> Tensor:
    """Fill in log T(y), log p_ref(y); [N] bool, where a teacher that is used is not finite."""
    teacher = problem.teacher
    bad_teacher = torch.zeros_like(problem.labelled)
    if isinstance(teacher, SparseTeacher):
        bad_teacher, stats["teacher_logp_y"] = teacher.not_finite, teacher.label_logp
    elif "bad" in merged:
        bad_teacher = (merged["bad"] > 0) | (merged["m_t"] <= FLOOR)
        if "s_t" in merged:
            stats["teacher_logp_y"] = (merged["t_y"] - merged["m_t"]) - torch.log(merged["s_t"])
    reads = problem.objective.where_needs(
        "teacher_logp_y", "reference_logp_y", "sequence_log_ratio"
    )
    # a teacher that a token does not use may be anything
    bad_teacher = bad_teacher & ((problem.b != 0) | reads)
    if problem.reference_logprobs is not None:
        stats["reference_logp_y"] = problem.reference_logprobs
    elif "s_t" in merged:
        stats["reference_logp_y"] = stats["teacher_logp_y"]
    if "reference_logp_y" in stats:
        reference = stats["reference_logp_y"]
        reads = problem.objective.where_needs("reference_logp_y", "sequence_log_ratio")
        bad_teacher = bad_teacher | ((torch.isnan(reference) | (reference == torch.inf)) & reads)
        # at -inf a weight of 0 could not remove the ratio
        stats["reference_logp_y"] = reference.clamp(min=FLOOR)
    return bad_teacher


def _sequence_mean(problem: Problem, stats: Statistics, supervised: Tensor) -> Tensor:
    """mean over each token's sequence of log p(y) - log p_ref(y), [N]; sequences may span CP ranks.

    On CUDA index_add_ adds in any order, so iw-sft alone may differ in its last bits from run to
    run.
    """
    assert problem.sequence_ids is not None
    # in a mixture other tokens may have no reference
    counted = supervised & ~torch.isnan(stats.reference_logp_y)
    ratio = torch.where(
        counted, stats.logp_y - stats.reference_logp_y, torch.zeros_like(stats.logp_y)
    )
    values = torch.stack([ratio, counted.to(ratio.dtype)])  # [2, N]
    totals = torch.zeros(2, problem.num_sequences, dtype=ratio.dtype, device=ratio.device)
    totals.index_add_(1, problem.sequence_ids, values)
    if problem.cp_group is not None and problem.cp_group.size() > 1:
        dist.all_reduce(totals, group=problem.cp_group)
    return (totals[0] / totals[1].clamp(min=1))[problem.sequence_ids]


BACKWARD_STATISTICS = ("m", "s", "m_pi", "s_pi", "m_t")  # the statistics that backward reads


def keep_for_backward(
    problem: Problem, merged: Table, targets: Targets
) -> tuple[list[str], list[Tensor]]:
    """Names and tensors [N] of what `gradient_weights` needs."""
    numbers: dict[str, Tensor] = {
        key: getattr(targets, key) for key in ("supervised", "logp_y", "imitation", "residual")
    }
    if targets.pi_logp_y is not None:
        numbers["pi_logp_y"] = targets.pi_logp_y
    # copies: views of the table would keep all of it, and autograd counts versions by storage
    numbers |= {
        name: merged[name].clone()
        for name in BACKWARD_STATISTICS
        if name in merged and (name != "m_t" or problem.has_pi)
    }
    return list(numbers), list(numbers.values())


def gradient_weights(
    scale: float, numbers: dict[str, Tensor], grad_output: Tensor
) -> GradientWeights:
    """The numbers of dloss/dlogits for an upstream gradient [N], where 0 means an idle token."""
    upstream = grad_output.to(numbers["m"].dtype) * scale
    imitation, residual = numbers["imitation"] * upstream, numbers["residual"] * upstream
    logp_y = numbers["logp_y"]
    # the label's column from expm1, where p_y - 1 would cancel
    label = imitation * torch.expm1(logp_y)
    has_pi = "pi_logp_y" in numbers
    if has_pi:
        label = label + residual * (logp_y.exp() - numbers["pi_logp_y"].exp())
    return GradientWeights(
        active=numbers["supervised"] & (grad_output != 0),
        m=numbers["m"],
        p=((imitation + residual) if has_pi else imitation) / numbers["s"],
        label=label,
        m_pi=numbers["m_pi"] if has_pi else None,
        pi=residual / numbers["s_pi"] if has_pi else None,
        m_t=numbers.get("m_t") if has_pi else None,
    )


def output_fields(targets: Targets, shape: torch.Size) -> dict[str, Any]:
    """QTargetOutput's fields beside the loss, in the labels' shape."""
    return {
        key: value.view(shape) if value.dim() else value for key, value in targets.reported.items()
    }
