"""The 18 objectives as their papers write them: dense, fp64, plain autograd. Independent: nothing
of the package here.

Two descriptions of each objective, which test_published.py holds against one another:

- `PUBLISHED[name]` is the published loss; autograd of it is the truth for gradients.
- `SURROGATE[name]` is (c_y, c_r, pi) of c_y * CE(onehot(y), p) + c_r * CE(pi, p), in closed form:
  the truth for values.

Both take a `Batch` of N tokens over the true vocabulary V and the objective's parameters, numbers
or [N] tensors.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

# the rows whose surrogate is the published loss itself; the others' differ by a constant or have
# equal gradients only
SAME_VALUE = frozenset(
    "sft dft profit eaft iw-sft critical label-smoothing gem kd kd-hybrid target-sft gift"
    " idft".split()
)


@dataclass(frozen=True)
class Batch:
    """N tokens: logits `z`, labels `y`, and what an objective may need besides."""

    z: Tensor  # [N, V] fp64
    y: Tensor  # [N]
    log_t: Tensor | None = None  # [N, V], normalised
    log_ref: Tensor | None = None  # [N] log p_ref(y)
    sequence_log_ratio: Tensor | None = None  # [N]

    def at_y(self, x: Tensor) -> Tensor:
        return x.gather(-1, self.y[:, None])[:, 0]

    @property
    def log_p(self) -> Tensor:
        return torch.log_softmax(self.z, -1)

    @property
    def p(self) -> Tensor:
        return torch.softmax(self.z, -1)

    @property
    def nll(self) -> Tensor:
        return -self.at_y(self.log_p)

    @property
    def p_y(self) -> Tensor:
        return self.at_y(self.p)

    @property
    def onehot(self) -> Tensor:
        return torch.nn.functional.one_hot(self.y, self.z.shape[-1]).double()

    @property
    def t(self) -> Tensor:
        assert self.log_t is not None
        return self.log_t.exp()

    def rows(self, chosen: Tensor) -> "Batch":
        """The tokens of a mask [N]."""
        parts = {key: None if value is None else value[chosen] for key, value in vars(self).items()}
        return replace(self, **parts)

    def detached(self) -> "Batch":
        return replace(self, z=self.z.detach())


def column(parameter: Any) -> Any:
    """A per-token parameter [N] as [N, 1]; a number as it is."""
    return parameter[:, None] if isinstance(parameter, Tensor) and parameter.dim() else parameter


def cross_entropy(q: Tensor, log_p: Tensor) -> Tensor:
    """-sum q log p [N], 0 log 0 = 0."""
    return -torch.where(q > 0, q * log_p, torch.zeros_like(q)).sum(-1)


def kl_divergence(q: Tensor, log_p: Tensor) -> Tensor:
    """sum q log(q / p) [N]."""
    return torch.where(q > 0, q * (q.clamp(min=1e-300).log() - log_p), torch.zeros_like(q)).sum(-1)


def entropy(p: Tensor) -> Tensor:
    return torch.special.entr(p).sum(-1)


def sequence_log_ratio(batch: Batch, ids: Tensor, counted: Tensor) -> Tensor:
    """mean of log p(y) - log p_ref(y) over the counted tokens of each token's sequence, [N]."""
    assert batch.log_ref is not None
    ratio = (-batch.nll - batch.log_ref).detach()
    out = torch.zeros_like(ratio)
    for i in ids.unique().tolist():
        members = (ids == i) & counted
        if members.any():
            out[ids == i] = ratio[members].mean()
    return out


def topk_teacher(
    ids: Tensor,  # [N, k], -1 is padding
    logprobs: Tensor,  # [N, k]
    vocab_size: int,
    tail: str,
    tail_logmass: Tensor | None = None,  # [N]
) -> Tensor:
    """log T [N, V] of a teacher known at k tokens."""
    mass = torch.zeros(len(ids), vocab_size, dtype=torch.float64)
    for i in range(len(ids)):
        known = {
            int(v): float(logprob)
            for v, logprob in zip(ids[i], logprobs[i].double(), strict=True)
            if v >= 0
        }
        for v, logprob in known.items():
            mass[i, v] = torch.tensor(logprob, dtype=torch.float64).exp()
        if tail == "uniform":
            missing = (
                (1 - mass[i].sum()).clamp(min=0)
                if tail_logmass is None
                else tail_logmass[i].double().exp()
            )
            others = [v for v in range(vocab_size) if v not in known]
            mass[i, others] = missing / max(len(others), 1)
    return (mass / mass.sum(-1, keepdim=True)).log()


def power_loss(nll: Tensor, a: Any) -> Tensor:
    """(1 - p^a) / a, whose limit at a = 0 is -log p; p^a as exp(a log p), which autograd survives
    at p = 0."""
    a = torch.as_tensor(a, dtype=torch.float64).broadcast_to(nll.shape)
    safe = torch.where(a == 0, torch.ones_like(a), a)
    return torch.where(a == 0, nll, (1 - torch.exp(-safe * nll)) / safe)


def topk_confidence(b: Batch, top_k: int) -> Tensor:
    """Entropy of the renormalised k most likely tokens over log k."""
    top = b.p.topk(min(top_k, b.p.shape[-1]), -1).values
    k = torch.tensor(
        max(top.shape[-1], 2), dtype=torch.float64
    )  # of one token the entropy is 0, whatever it is over
    return (entropy(top / top.sum(-1, keepdim=True)) / k.log()).clamp(
        max=1
    )  # 1 is its maximum, but for rounding


def mixed_target(b: Batch, eta: Any) -> Tensor:
    """softmax((1 - eta) log p + eta log T): the residual of target-sft."""
    eta = column(torch.as_tensor(eta, dtype=torch.float64))
    guided = (
        torch.zeros_like(b.z)
        if b.log_t is None
        else torch.where(eta == 0, torch.zeros_like(b.z), eta * b.log_t)
    )
    own = torch.where(eta == 1, torch.zeros_like(b.z), (1 - eta) * b.log_p)
    return torch.softmax(own + guided, -1)


def gift_target(b: Batch, beta: Any) -> Tensor:
    assert b.log_t is not None
    return torch.softmax(b.log_t + column(beta) * b.onehot, -1)


def proximal_loss(b: Batch, clip_high: Any, clip_low: float = 0.2) -> Tensor:
    assert b.log_ref is not None
    r = torch.exp(-b.nll - b.log_ref)
    high = torch.as_tensor(1 + clip_high, dtype=torch.float64).broadcast_to(r.shape)
    clipped = torch.minimum(torch.clamp(r, min=1 - clip_low), high)
    return -torch.where(r <= clipped, r, clipped)


def importance_weight(b: Batch, temperature: Any, clip_min: Any, clip_max: Any) -> Tensor:
    assert b.sequence_log_ratio is not None
    w = torch.exp(temperature * b.sequence_log_ratio)
    low, high = (
        torch.as_tensor(x, dtype=torch.float64).broadcast_to(w.shape) for x in (clip_min, clip_max)
    )
    return torch.minimum(torch.maximum(w, low), high)


def idft_weight(
    b: Batch, threshold: Any, temperature: Any, weight_min: Any, weight_max: Any
) -> Tensor:
    score = (-b.nll + entropy(b.p) - threshold) / temperature
    return weight_max - (weight_max - weight_min) * torch.sigmoid(-score)


Loss = Callable[..., Tensor]

PUBLISHED: dict[str, Loss] = {
    "sft": lambda b: b.nll,
    "dft": lambda b: b.p_y.detach() * b.nll,
    "beyond-log": lambda b, alpha=1.0: power_loss(b.nll, alpha),
    "profit": lambda b, threshold=0.1: (b.p_y > threshold).double() * b.nll,
    "eaft": lambda b, top_k=20, power=1.0: topk_confidence(b.detached(), top_k) ** power * b.nll,
    "iw-sft": lambda b, temperature=1.0, clip_min=0.0, clip_max=16.0: (
        importance_weight(b.detached(), temperature, clip_min, clip_max) * b.nll
    ),
    "critical": lambda b: b.nll,
    "deft": lambda b: power_loss(b.nll, (b.p**2).sum(-1).detach()),
    "idft": lambda b, threshold=0.0, temperature=1.0, weight_min=0.1, weight_max=1.0: (
        idft_weight(b.detached(), threshold, temperature, weight_min, weight_max) * b.nll
    ),
    "proximal": lambda b, clip_high=0.28: proximal_loss(b, clip_high),
    "label-smoothing": lambda b, smoothing=0.1: (
        (1 - smoothing) * b.nll - smoothing * b.log_p.mean(-1)
    ),
    "sft-kl": lambda b, kl_weight=0.1: b.nll + kl_weight * kl_divergence(b.t, b.log_p),
    "asft": lambda b, kl_weight=0.05: (
        b.p_y.detach() * b.nll + kl_weight * kl_divergence(b.t, b.log_p)
    ),
    "gem": lambda b, beta=0.7: (
        b.nll - cross_entropy(torch.softmax(b.z.detach() / column(beta), -1), b.log_p)
    ),
    "kd": lambda b: cross_entropy(b.t, b.log_p),
    "kd-hybrid": lambda b, teacher_weight=0.5: (
        (1 - teacher_weight) * b.nll + teacher_weight * cross_entropy(b.t, b.log_p)
    ),
    "gift": lambda b, beta=20.0: cross_entropy(gift_target(b, beta), b.log_p),
    "target-sft": lambda b, eta=0.5: cross_entropy(
        (b.p_y[:, None] * b.onehot + (1 - b.p_y)[:, None] * mixed_target(b, eta)).detach(), b.log_p
    ),
}
NAMES = list(PUBLISHED)


def only_label(c_y: Any) -> tuple[Any, Any, None]:
    return c_y, 0.0, None


def gift_parts(b: Batch, beta: Any) -> tuple[Any, Any, Tensor]:
    """Q is T / Z away from y, Z = sum T e^(beta onehot); at y it is T e^beta / Z, of which T / Z
    belongs to pi."""
    z = (b.t * torch.exp(column(beta) * b.onehot)).sum(-1)
    return b.at_y(b.t) * torch.expm1(torch.as_tensor(beta, dtype=torch.float64)) / z, 1 / z, b.t


def proximal_weight(b: Batch, clip_high: Any) -> Tensor:
    assert b.log_ref is not None
    r = torch.exp(-b.nll - b.log_ref)
    return torch.where(r > 1 + clip_high, torch.zeros_like(r), r)


def uniform(b: Batch) -> Tensor:
    return torch.full_like(b.z, 1 / b.z.shape[-1])


SURROGATE: dict[str, Callable[..., tuple[Any, Any, Tensor | None]]] = {
    "sft": lambda b: only_label(1.0),
    "dft": lambda b: only_label(b.p_y),
    "beyond-log": lambda b, alpha=1.0: only_label(b.p_y**alpha),
    "profit": lambda b, threshold=0.1: only_label((b.p_y > threshold).double()),
    "eaft": lambda b, top_k=20, power=1.0: only_label(topk_confidence(b, top_k) ** power),
    "iw-sft": lambda b, temperature=1.0, clip_min=0.0, clip_max=16.0: only_label(
        importance_weight(b, temperature, clip_min, clip_max)
    ),
    "critical": lambda b: only_label(1.0),
    "deft": lambda b: only_label(torch.exp(-(b.p**2).sum(-1) * b.nll)),
    "idft": lambda b, threshold=0.0, temperature=1.0, weight_min=0.1, weight_max=1.0: only_label(
        idft_weight(b, threshold, temperature, weight_min, weight_max)
    ),
    "proximal": lambda b, clip_high=0.28: only_label(proximal_weight(b, clip_high)),
    "label-smoothing": lambda b, smoothing=0.1: (1 - smoothing, smoothing, uniform(b)),
    "sft-kl": lambda b, kl_weight=0.1: (1.0, kl_weight, b.t),
    "asft": lambda b, kl_weight=0.05: (b.p_y, kl_weight, b.t),
    "gem": lambda b, beta=0.7: (1.0, -1.0, torch.softmax(b.z / column(beta), -1)),
    "kd": lambda b: (0.0, 1.0, b.t),
    "kd-hybrid": lambda b, teacher_weight=0.5: (1 - teacher_weight, teacher_weight, b.t),
    "gift": lambda b, beta=20.0: gift_parts(b, beta),
    "target-sft": lambda b, eta=0.5: (b.p_y, 1 - b.p_y, mixed_target(b, eta)),
}


@dataclass(frozen=True)
class Expected:
    """Per token [N]: the published loss (differentiable in z), the surrogate's value, and its
    parts."""

    published: Tensor
    loss: Tensor
    imitation: Tensor
    residual: Tensor
    largest_pi: Tensor  # max pi, 0 without a residual
    nll: Tensor
    entropy: Tensor
    kl: Tensor  # KL(Q || p), NaN where it is not promised


def expected(
    batch: Batch, members: Sequence[tuple[str, dict[str, Any]]], index: Tensor
) -> Expected:
    """Token i follows members[index[i]] = (name, parameters)."""
    n = len(batch.y)
    parts = {key: torch.zeros(n, dtype=torch.float64) for key in Expected.__dataclass_fields__}
    for i, (name, parameters) in enumerate(members):
        chosen = index == i
        given = {
            k: v[chosen] if isinstance(v, Tensor) and v.dim() else v for k, v in parameters.items()
        }
        b = batch.rows(chosen)
        parts["published"] = parts["published"].masked_scatter(chosen, PUBLISHED[name](b, **given))
        for key, value in surrogate_values(b.detached(), name, given).items():
            parts[key][chosen] = value
    return Expected(**parts)


def surrogate_values(b: Batch, name: str, parameters: dict[str, Any]) -> dict[str, Tensor]:
    c_y, c_r, pi = SURROGATE[name](b, **parameters)
    c_y, c_r = (torch.as_tensor(c, dtype=torch.float64).broadcast_to(b.y.shape) for c in (c_y, c_r))
    pi = torch.zeros_like(b.z) if pi is None else pi
    spread = torch.where(c_r == 0, torch.zeros_like(c_r), c_r * cross_entropy(pi, b.log_p))
    q = (1 - c_y - c_r)[:, None] * b.p + c_y[:, None] * b.onehot + c_r[:, None] * pi
    label_only = (c_r == 0) & (c_y >= 0) & (c_y <= 1)
    whole = (c_r > 0) & (c_y >= 0) & ((c_y + c_r - 1).abs() < 1e-9)
    kl = torch.where(label_only | whole, kl_divergence(q, b.log_p), torch.full_like(c_y, torch.nan))
    largest = torch.where(c_r == 0, torch.zeros_like(c_r), pi.amax(-1)) if len(c_r) else c_r
    coefficients = {"imitation": c_y, "residual": c_r, "largest_pi": largest}
    return coefficients | {
        "loss": c_y * b.nll + spread,
        "nll": b.nll,
        "entropy": entropy(b.p),
        "kl": kl,
    }
