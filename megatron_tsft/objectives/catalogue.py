"""The catalogue: one row per objective, each a choice of how far to trust the label and how to
spread the rest.

Every row returns the coefficients of one formula (design of arXiv 2606.11189, generalised), per
token:

    loss = imitation * CE(onehot(y), p) + residual * CE(pi, p),    pi = softmax(a * z + b * log T),
    detached

with p = softmax(z), y the observed token and T a frozen second distribution ("the teacher").
Notation in the rows: c_y is `imitation` (the paper's gamma), c_r is `residual`, H the entropy of p.
"""

import torch

from megatron_tsft.objectives.definition import (
    Coefficients,
    Count,
    NonNegative,
    Positive,
    Real,
    Statistics,
    Unit,
)
from megatron_tsft.objectives.registry import register
from megatron_tsft.objectives.tensors import as_like, log_expm1


@register("sft", source="maximum likelihood")
def sft(s: Statistics) -> Coefficients:
    """-log p(y): c_y = 1"""
    return Coefficients(imitation=1.0)


@register("dft", source="arXiv:2508.05629")
def dft(s: Statistics) -> Coefficients:
    """-sg[p(y)] log p(y): c_y = p(y)"""
    return Coefficients(imitation=s.p_y)


@register("beyond-log", source="arXiv:2510.00526")
def beyond_log(s: Statistics, *, alpha: NonNegative = 1.0) -> Coefficients:
    """(1 - p(y)^alpha) / alpha, -log p(y) at alpha = 0: c_y = p(y)^alpha"""
    return Coefficients(imitation=torch.exp(alpha * s.logp_y))


@register("profit", source="arXiv:2601.09195")
def profit(s: Statistics, *, threshold: Unit = 0.1) -> Coefficients:
    """-1[p(y) > threshold] log p(y): c_y = 1[p(y) > threshold]"""
    return Coefficients(imitation=(s.p_y > threshold).to(s.p_y.dtype))


@register("eaft", source="arXiv:2601.02151", needs=("topk_entropy", "topk_log_k"))
def eaft(s: Statistics, *, top_k: Count = 20, power: NonNegative = 1.0) -> Coefficients:
    """-(H_topk / log k)^power log p(y), H over the renormalised k most likely tokens: c_y = (H_topk
    / log k)^power"""
    return Coefficients(imitation=(s.topk_entropy / s.topk_log_k).clamp(0, 1) ** power)


@register(
    "iw-sft",
    source="arXiv:2507.12856",
    needs=("sequence_log_ratio",),
    ordered=[("clip_min", "clip_max")],
)
def iw_sft(
    s: Statistics,
    *,
    temperature: NonNegative = 1.0,
    clip_min: NonNegative = 0.0,
    clip_max: NonNegative = 16.0,
) -> Coefficients:
    """-w log p(y), w = clamp(exp(temperature * mean_sequence(log p(y) - log p_ref(y))), clip_min,
    clip_max): c_y = w"""
    w = torch.exp(temperature * s.sequence_log_ratio)
    return Coefficients(imitation=torch.clamp(w, as_like(clip_min, w), as_like(clip_max, w)))


@register("critical", source="arXiv:2510.10974", token_weights=True)
def critical(s: Statistics) -> Coefficients:
    """-c log p(y), c = token_weights (1 on critical tokens, else 0), which are required: c_y = 1"""
    return Coefficients(imitation=1.0)


@register("deft", source="arXiv:2602.11424", needs=("collision",))
def deft(s: Statistics) -> Coefficients:
    """(1 - p(y)^a) / a, a = sg[sum p^2]: c_y = p(y)^(sum p^2)"""
    return Coefficients(imitation=torch.exp(s.collision * s.logp_y))


@register(
    "idft", source="arXiv:2602.12222", needs=("entropy",), ordered=[("weight_min", "weight_max")]
)
def idft(
    s: Statistics,
    *,
    threshold: Real = 0.0,
    temperature: Positive = 1.0,
    weight_min: NonNegative = 0.1,
    weight_max: NonNegative = 1.0,
) -> Coefficients:
    """-w log p(y): c_y = w = weight_max - (weight_max-weight_min) sigmoid(-(log p(y) + H -
    threshold) / temperature)"""
    gate = torch.sigmoid(-(s.logp_y + s.entropy - threshold) / temperature)
    return Coefficients(imitation=weight_max - (weight_max - weight_min) * gate)


@register("proximal", source="arXiv:2508.17784", needs=("reference_logp_y",))
def proximal(s: Statistics, *, clip_high: NonNegative = 0.28) -> Coefficients:
    """-min(r, clip(r, ., 1 + clip_high)), r = p(y) / p_ref(y): c_y = r where r <= 1 + clip_high,
    else 0"""
    r = torch.exp(s.logp_y - s.reference_logp_y)
    return Coefficients(imitation=torch.where(r <= 1 + clip_high, r, torch.zeros_like(r)))


@register("label-smoothing", source="arXiv:1512.00567")
def label_smoothing(s: Statistics, *, smoothing: Unit = 0.1) -> Coefficients:
    """(1 - smoothing) CE(onehot) + smoothing CE(uniform over the true vocabulary): c_y = 1 - c_r,
    c_r = smoothing"""
    return Coefficients(imitation=1 - smoothing, residual=smoothing, a=0.0, b=0.0)


@register("sft-kl", source="arXiv:2509.04259", teacher="required")
def sft_kl(s: Statistics, *, kl_weight: NonNegative = 0.1) -> Coefficients:
    """-log p(y) + kl_weight KL(T || p): c_y = 1, c_r = kl_weight, pi = T"""
    return Coefficients(imitation=1.0, residual=kl_weight, a=0.0, b=1.0)


@register("asft", source="arXiv:2509.23753", teacher="required")
def asft(s: Statistics, *, kl_weight: NonNegative = 0.05) -> Coefficients:
    """-sg[p(y)] log p(y) + kl_weight KL(T || p): c_y = p(y), c_r = kl_weight, pi = T"""
    return Coefficients(imitation=s.p_y, residual=kl_weight, a=0.0, b=1.0)


@register("gem", source="arXiv:2408.16673")
def gem(s: Statistics, *, beta: Positive = 0.7) -> Coefficients:
    """CE(onehot) - CE(pi), pi = softmax(z / beta): c_y = 1, c_r = -1 (a signed target: no
    distribution)"""
    return Coefficients(imitation=1.0, residual=-1.0, a=1 / beta, b=0.0)


@register("kd", source="arXiv:1503.02531", teacher="required")
def kd(s: Statistics) -> Coefficients:
    """CE(T): c_y = 0, c_r = 1, pi = T"""
    return Coefficients(imitation=0.0, residual=1.0, a=0.0, b=1.0)


@register("kd-hybrid", source="arXiv:1503.02531", teacher="required")
def kd_hybrid(s: Statistics, *, teacher_weight: Unit = 0.5) -> Coefficients:
    """(1 - teacher_weight) CE(onehot) + teacher_weight CE(T): c_y = 1 - c_r, c_r = teacher_weight,
    pi = T"""
    return Coefficients(imitation=1 - teacher_weight, residual=teacher_weight, a=0.0, b=1.0)


@register("gift", source="arXiv:2601.09233", needs=("teacher_logp_y",), teacher="required")
def gift(s: Statistics, *, beta: NonNegative = 20.0) -> Coefficients:
    """CE(softmax(log T + beta onehot(y))): c_y = 1 - c_r, c_r = 1 / (1 + T(y) expm1(beta)), pi =
    T"""
    # log(T(y) expm1(beta)) never overflows; c_r = sigmoid(-x) and c_y = sigmoid(x) never cancel
    x = s.teacher_logp_y + log_expm1(as_like(beta, s.logp_y))
    return Coefficients(imitation=torch.sigmoid(x), residual=torch.sigmoid(-x), a=0.0, b=1.0)


@register("target-sft", source="arXiv:2606.11189", teacher="optional")
def target_sft(s: Statistics, *, eta: Unit = 0.5) -> Coefficients:
    """CE(Q), Q = p(y) onehot(y) + (1 - p(y)) softmax((1 - eta) log p + eta log T): c_y = p(y), c_r
    = 1 - p(y)"""
    return Coefficients(imitation=s.p_y, residual=-torch.expm1(s.logp_y), a=1 - eta, b=eta)
