"""The definition: the dense, unsharded Q-target loss in plain torch autograd, to hold against the
papers.

It builds T, pi and Q as full distributions, one line each, and lets autograd do the rest. Slow and
memory-hungry on purpose; `q_target_cross_entropy` computes the same numbers on shards.
"""

import torch
from torch import Tensor

from megatron_tsft.loss.records import QTargetOutput, TeacherTopK
from megatron_tsft.objectives import Objective, Statistics


def dense_teacher(teacher: TeacherTopK, vocab_size: int) -> Tensor:
    """log T [..., V] of a top-k teacher with its tail, fp64."""
    lead, k = teacher.ids.shape[:-1], teacher.ids.shape[-1]
    ids, logprobs = (
        teacher.ids.reshape(lead.numel(), k).long(),
        teacher.logprobs.reshape(lead.numel(), k).double(),
    )
    log_t = torch.full((ids.shape[0], vocab_size), -torch.inf, dtype=torch.float64)
    for i in range(ids.shape[0]):
        present = ids[i] >= 0
        if teacher.tail == "uniform":
            known = teacher.tail_logmass
            missing = (1 - logprobs[i, present].exp().sum()).clamp(min=0)
            mass = missing if known is None else known.reshape(-1)[i].double().exp()
            log_t[i] = torch.log(mass / (vocab_size - int(present.sum())))
        log_t[i, ids[i, present]] = logprobs[i, present]
    return torch.log_softmax(log_t, -1).reshape(*lead, vocab_size)


def entropy(p: Tensor) -> Tensor:
    """H of distributions p [..., n], [...]."""
    return -torch.xlogy(p, p).sum(-1)


def q_target_reference(
    logits: Tensor,  # [..., V]
    labels: Tensor,  # [...] int64
    objective: Objective,
    teacher: Tensor | TeacherTopK | None = None,
    reference_logprobs: Tensor | None = None,
    token_weights: Tensor | None = None,
    sequence_ids: Tensor | None = None,
    logit_scale: float = 1.0,
    vocab_size: int | None = None,
    ignore_index: int = -100,
) -> QTargetOutput:
    """As `q_target_cross_entropy` on one rank, with entropy and KL always; differentiable by
    autograd in `logits`."""
    shape, v = labels.shape, vocab_size or logits.shape[-1]
    objective = objective.flatten(shape)
    working = torch.float64 if logits.dtype == torch.float64 else torch.float32
    z = logits.reshape(-1, logits.shape[-1])[:, :v].to(working) * logit_scale
    supervised = labels.reshape(-1) != ignore_index
    y = labels.reshape(-1).clamp(min=0)

    def at_y(x: Tensor) -> Tensor:
        return x.gather(-1, y[:, None])[:, 0]

    log_p = torch.log_softmax(z, -1)
    p = log_p.exp()
    log_t = None
    if isinstance(teacher, TeacherTopK):
        log_t = dense_teacher(teacher, v).reshape(-1, v).to(working)
        if reference_logprobs is None:
            reference_logprobs = teacher.label_logprobs
    elif teacher is not None:
        log_t = torch.log_softmax(teacher.reshape(-1, teacher.shape[-1])[:, :v].to(working), -1)

    s = Statistics(logp_y=at_y(log_p).detach())
    s["p_y"], s["nll"] = s.logp_y.exp(), -s.logp_y
    s["entropy"] = entropy(p.detach())
    s["collision"] = p.detach().square().sum(-1)
    for k in objective.top_ks:
        top = torch.softmax(z.detach().topk(min(k, v)).values, -1)
        s[f"topk_entropy_{k}"] = entropy(top)
        s[f"topk_log_k_{k}"] = torch.full_like(s.p_y, max(min(k, v), 2)).log()
    if log_t is not None:
        s["teacher_logp_y"] = s["reference_logp_y"] = at_y(log_t)
    if reference_logprobs is not None:
        s["reference_logp_y"] = (
            reference_logprobs.reshape(-1).to(working).clamp(min=-1e30)
        )  # 0 * (-inf) is 0
    if sequence_ids is not None and "reference_logp_y" in s:
        ratio, ids = s.logp_y - s.reference_logp_y, sequence_ids.reshape(-1)
        members = (ids[:, None] == ids[None, :]) & supervised[None, :]  # [N, N]
        s["sequence_log_ratio"] = (members * ratio).sum(-1) / members.sum(-1).clamp(min=1)

    c = objective.coefficients(s)
    c_y, c_r, a, b = (
        torch.as_tensor(x, dtype=working).broadcast_to(y.shape)[:, None]
        for x in (c.imitation, c.residual, c.a, c.b)
    )
    az = torch.where(a == 0, torch.zeros_like(z), a * z.detach())
    bt = (
        torch.zeros_like(z)
        if log_t is None
        else torch.where(b == 0, torch.zeros_like(z), b * log_t)
    )
    log_pi = torch.log_softmax(az + bt, -1)
    pi = log_pi.exp()
    cross_entropy = -(pi * torch.where(pi > 0, log_p, torch.zeros_like(log_p))).sum(-1)
    weights = (
        torch.ones_like(s.p_y) if token_weights is None else token_weights.reshape(-1).to(working)
    )
    c_y, c_r = c_y[:, 0], c_r[:, 0]
    loss = weights * (
        c_y * -at_y(log_p) + torch.where(c_r == 0, torch.zeros_like(c_r), c_r * cross_entropy)
    )

    onehot = torch.nn.functional.one_hot(y, v).to(working)
    residual_part = torch.where((c_r == 0)[:, None], torch.zeros_like(pi), c_r[:, None] * pi)
    background = (1 - c_y - c_r).clamp(
        min=0
    )  # of a distribution; rounding may put it below zero, where log is NaN
    q = background[:, None] * p.detach() + c_y[:, None] * onehot + residual_part
    kl = (torch.xlogy(q, q) - q * log_p.detach()).sum(-1)
    distribution = ((c_r == 0) & (c_y >= 0) & (c_y <= 1)) | (
        (c_r > 0) & (c_y >= 0) & ((c_y + c_r - 1).abs() < 1e-5)
    )
    kl = torch.where(distribution, kl, torch.full_like(kl, torch.nan))

    def out(x: Tensor) -> Tensor:
        return torch.where(supervised, x, torch.zeros_like(x)).reshape(shape)

    return QTargetOutput(
        loss=out(loss),
        nll=out(s.nll),
        imitation=out(c_y),
        residual=out(c_r),
        supervised=supervised.reshape(shape),
        bad_teacher_rows=torch.zeros((), dtype=torch.int64),
        entropy=out(s.entropy),
        kl=out(kl),
    )
