"""Random problems for the loss: made once, run on any number of ranks by the public API, held
against published.py.

Legend: s and b are the leading dimensions, V the true vocabulary, W >= V the padded one, w = W /
    ranks a rank's shard.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tsft import (
    QTargetOutput,
    TeacherTopK,
    objectives,
    q_target_cross_entropy,
    q_target_linear_cross_entropy,
)
from megatron_tsft.loss import linear_head, token_chunks
from megatron_tsft.loss.reference import q_target_reference
from tests.loss import published
from tests.ranks import run_ranks

NEEDS_TEACHER = ("sft-kl", "asft", "kd", "kd-hybrid", "gift", "target-sft")
NEEDS_REFERENCE = ("iw-sft", "proximal")

# away from the defaults, so that a parameter that is not passed on shows
NUMBERS: dict[str, dict[str, Any]] = {
    "beyond-log": {"alpha": 2.5},
    "profit": {"threshold": 0.05},
    "eaft": {"top_k": 5, "power": 1.5},
    "iw-sft": {"temperature": 0.7, "clip_min": 0.8, "clip_max": 1.3},
    "idft": {"threshold": -1.0, "temperature": 0.7, "weight_min": 0.2, "weight_max": 0.9},
    "proximal": {"clip_high": 0.15},
    "label-smoothing": {"smoothing": 0.2},
    "sft-kl": {"kl_weight": 0.3},
    "asft": {"kl_weight": 0.2},
    "gem": {"beta": 0.6},
    "kd-hybrid": {"teacher_weight": 0.3},
    "gift": {"beta": 3.0},
    "target-sft": {"eta": 0.4},
}
# per-token parameters are drawn uniformly from these
INTERVALS: dict[str, dict[str, tuple[float, float]]] = {
    "beyond-log": {"alpha": (0, 4)},
    "profit": {"threshold": (0, 0.3)},
    "eaft": {"power": (0, 2)},
    "iw-sft": {"temperature": (0, 2), "clip_min": (0, 0.9), "clip_max": (1, 3)},
    "idft": {
        "threshold": (-2, 2),
        "temperature": (0.2, 2),
        "weight_min": (0, 0.5),
        "weight_max": (0.5, 2),
    },
    "proximal": {"clip_high": (0, 0.6)},
    "label-smoothing": {"smoothing": (0, 1)},
    "sft-kl": {"kl_weight": (0, 1)},
    "asft": {"kl_weight": (0, 1)},
    "gem": {"beta": (0.3, 2)},
    "kd-hybrid": {"teacher_weight": (0, 1)},
    "gift": {"beta": (0, 20)},
    "target-sft": {"eta": (0, 1)},
}


@dataclass(frozen=True)
class Case:
    """One call of the loss, unsharded. Token i follows members[index[i]]; without an index there is
    one member."""

    members: Sequence[tuple[str, dict[str, Any]]]
    logits: Tensor  # [..., W]
    labels: Tensor  # [...]
    upstream: Tensor  # [...] gradient with respect to the loss
    vocab_size: int
    index: Tensor | None = None  # [...]
    teacher: Tensor | TeacherTopK | None = None
    reference_logprobs: Tensor | None = None
    token_weights: Tensor | None = None
    sequence_ids: Tensor | None = None
    num_sequences: int | None = None
    logit_scale: float = 1.0
    diagnostics: tuple[str, ...] = ()
    strided: bool = False  # logits and teacher are not contiguous
    inplace: bool = False
    chunk: int | None = None  # fp32 scratch elements: small, so that several chunks are needed
    bad_rows: Tensor | None = field(
        default=None, compare=False
    )  # [...] tokens whose teacher row is not finite

    @property
    def objective(self) -> objectives.Objective:
        members = [objectives.get(name, **parameters) for name, parameters in self.members]
        return members[0] if self.index is None else objectives.mixture(members, self.index)


def random_case(
    name: str, seed: int, *, width: int, vocab_size: int, dtype: torch.dtype, variant: str
) -> Case:
    """Variant "plain": [s, b], numbers as parameters. "rich": [N], per-token parameters, and every
    other option."""
    g = torch.Generator().manual_seed(seed)
    plain = variant == "plain"
    shape = (5, 3) if plain else (13,)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=g, dtype=torch.float64)

    logits = (2 * normal(*shape, width)).to(dtype)
    teacher = logits.double() + 1.5 * normal(*shape, width)
    scale = 1.0 if plain else 0.75
    log_p = torch.log_softmax(scale * logits[..., :vocab_size].double(), -1)
    labels = torch.multinomial(log_p.exp().reshape(-1, vocab_size), 1, generator=g).reshape(shape)
    unlikely = torch.rand(shape, generator=g) < 0.5
    labels = torch.where(unlikely, torch.randint(0, vocab_size, shape, generator=g), labels)
    reference = log_p.gather(-1, labels[..., None])[..., 0] + 0.4 * normal(*shape)
    labels[torch.rand(shape, generator=g) < 0.15] = -100
    upstream = normal(*shape)
    upstream[torch.rand(shape, generator=g) < 0.15] = 0

    parameters = NUMBERS.get(name, {}) if plain else {}
    if not plain:
        for key, (low, high) in INTERVALS.get(name, {}).items():
            parameters[key] = low + (high - low) * torch.rand(
                shape, generator=g, dtype=torch.float64
            )
    from_teacher = name in NEEDS_REFERENCE and not plain  # log p_ref(y) is then the dense teacher's
    return Case(
        members=[(name, parameters)],
        logits=garbage_padding(logits, vocab_size),
        labels=labels,
        upstream=upstream,
        vocab_size=vocab_size,
        teacher=garbage_padding(teacher.to(dtype), vocab_size)
        if name in NEEDS_TEACHER or from_teacher
        else None,
        reference_logprobs=reference if name in NEEDS_REFERENCE and plain else None,
        token_weights=2 * torch.rand(shape, generator=g)
        if name == "critical" or not plain
        else None,
        sequence_ids=torch.randint(0, 4, shape, generator=g) if name == "iw-sft" else None,
        num_sequences=5 if name == "iw-sft" else None,
        logit_scale=scale,
        diagnostics=() if plain else ("entropy", "kl"),
        strided=not plain,
        inplace=not plain,
        chunk=None if plain else 40,
    )


def garbage_padding(x: Tensor, vocab_size: int) -> Tensor:
    """What lies in padded columns must not matter: huge, infinite, NaN."""
    x = x.clone()
    padding = x[..., vocab_size:]
    padding[...] = torch.tensor(
        [6e4, torch.nan, -6e4, torch.inf, -torch.inf], dtype=x.dtype
    ).repeat(x.shape[-1])[: padding.shape[-1]]
    return x


def shard_of(x: Tensor, rank: int, world: int, strided: bool = False) -> Tensor:
    """[..., W] -> this rank's [..., w], a fresh tensor."""
    width = x.shape[-1] // world
    mine = x[..., rank * width : (rank + 1) * width]
    return (
        mine.movedim(-1, 0).contiguous().movedim(0, -1)
        if strided
        else mine.clone(memory_format=torch.contiguous_format)
    )


PATHS = (
    "torch",
    "triton",
    "fused",
)  # implementations; "triton" runs in its interpreter where there is no GPU


def call(
    case: Case,
    logits: Tensor,
    rank: int = 0,
    world: int = 1,
    group: "dist.ProcessGroup | None" = None,
    **changes: Any,
) -> QTargetOutput:
    """The public function on this rank's `logits`."""
    teacher = case.teacher
    if isinstance(teacher, Tensor):
        teacher = shard_of(teacher, rank, world, case.strided)
    return q_target_cross_entropy(
        logits, case.labels, case.objective, **(keywords_of(case, teacher, group) | changes)
    )


def keywords_of(case: Case, teacher: Any, group: "dist.ProcessGroup | None") -> dict[str, Any]:
    """What the case says beyond logits, labels and objective."""
    return dict(
        teacher=teacher,
        reference_logprobs=case.reference_logprobs,
        token_weights=case.token_weights,
        sequence_ids=case.sequence_ids,
        num_sequences=case.num_sequences,
        logit_scale=case.logit_scale,
        diagnostics=case.diagnostics,
        tp_group=group,
        vocab_size=case.vocab_size,
        inplace=case.inplace,
    )


@contextlib.contextmanager
def implementation(path: str, chunk: int | None = None) -> Iterator[None]:
    """Choose one of PATHS, with chunks and blocks so small that every case needs several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TSFT_BACKEND", "triton" if path == "triton" else "torch")
        patch.setattr(linear_head, "MIN_COLUMNS", 3)
        if chunk:
            patch.setitem(token_chunks.CHUNK_ELEMENTS, "cpu", chunk)
        if path == "triton":
            from megatron_tsft.loss.triton import launch

            patch.setattr(launch, "BLOCK", 8)
        yield


def run(
    case: Case,
    rank: int = 0,
    world: int = 1,
    group: "dist.ProcessGroup | None" = None,
    path: str = "torch",
    **changes: Any,
) -> dict[str, Any]:
    """Forward and backward on this rank: the output's fields, and the gradient of its shard as
    "grad"."""
    leaf = shard_of(case.logits, rank, world, case.strided).requires_grad_()
    with implementation(path, case.chunk):
        if path == "fused":
            return run_fused(case, leaf, rank, world, group, **changes)
        # not the leaf itself, so that inplace has a tensor of its own to write to
        out = call(case, leaf * 1, rank, world, group, **changes)
        out.loss.backward(case.upstream.to(out.loss.dtype))
    assert leaf.grad is not None
    return fields_of(out) | {"grad": leaf.grad}


def fields_of(out: QTargetOutput) -> dict[str, Any]:
    return {key: value.detach() for key, value in vars(out).items() if value is not None}


def run_fused(
    case: Case,
    logits: Tensor,
    rank: int,
    world: int,
    group: "dist.ProcessGroup | None",
    **changes: Any,
) -> dict[str, Any]:
    """The fused head with hidden = identity, weight = logits.T: logits are the case's, the weight's
    gradient theirs.

    What lies in padded rows of a weight is finite, so garbage in padding is as large as it can be
    and no more.
    """
    n, width = case.labels.numel(), logits.shape[-1]
    hidden = torch.eye(n, dtype=logits.dtype).reshape(*case.labels.shape, n).requires_grad_()
    largest = torch.finfo(logits.dtype).max / 1e3
    flat = logits.detach().reshape(n, width).clone()
    padding = flat[:, max(0, min(width, case.vocab_size - rank * width)) :]
    padding.copy_(padding.nan_to_num(1.0, 1e4, -1e4).clamp(-largest, largest))
    weight = flat.T.requires_grad_()
    teacher = case.teacher
    if isinstance(teacher, Tensor):
        teacher = shard_of(teacher, rank, world, case.strided)
    keywords = keywords_of(case, teacher, group) | changes
    keywords.pop("inplace")
    out = q_target_linear_cross_entropy(hidden, weight, case.labels, case.objective, **keywords)
    out.loss.backward(case.upstream.to(out.loss.dtype))
    assert hidden.grad is not None and weight.grad is not None
    # this rank's part of hidden's gradient
    whole = weight.grad.double().T @ weight.detach().double()
    if group is not None:
        dist.all_reduce(whole, group=group)
    error = (hidden.grad.double().reshape(n, n) - whole).abs()
    scale = weight.grad.double().abs().T @ weight.detach().double().abs()
    if group is not None:
        dist.all_reduce(scale, group=group)
    info = torch.finfo(logits.dtype)
    assert (error <= 8 * info.eps * (scale + 4 * info.tiny)).all(), (
        f"hidden's gradient of {case.members}"
    )
    return fields_of(out) | {"grad": weight.grad.T.reshape(logits.shape)}


def run_reference(case: Case) -> dict[str, Any]:
    """`run` by the dense definition in megatron_tsft.loss.reference."""
    leaf = case.logits.clone().requires_grad_()
    out = q_target_reference(
        leaf,
        case.labels,
        case.objective,
        teacher=case.teacher,
        reference_logprobs=case.reference_logprobs,
        token_weights=case.token_weights,
        sequence_ids=case.sequence_ids,
        logit_scale=case.logit_scale,
        vocab_size=case.vocab_size,
    )
    out.loss.backward(case.upstream.to(out.loss.dtype))
    assert leaf.grad is not None
    return {key: value.detach() for key, value in vars(out).items()} | {"grad": leaf.grad}


def run_all(rank: int, world: int, cases: Sequence[Case], path: str) -> list[dict[str, Any]]:
    """`run` for every case in the default group; what a test gives to run_ranks."""
    return [run(case, rank, world, dist.group.WORLD, path) for case in cases]


def computed(world: int, cases: Sequence[Case], path: str = "torch") -> list[dict[str, Any]]:
    """The results of all cases on `world` ranks, from one start of them; one rank is this process,
    without a group."""
    if world == 1:
        return [run(case, path=path) for case in cases]
    return gathered(run_ranks(world, run_all, world, cases, path))


def implementations(*worlds: int, quick: bool = False) -> list[Any]:
    """Parameters for a fixture that calls `results_of`: each path on each number of ranks, and the
    definition.

    Triton's interpreter takes a third of a second a case: its runs are slow tests, but on one rank
    where `quick`.
    """
    out: list[Any] = ["reference"]
    for path in PATHS:
        for world in worlds:
            slow = path == "triton" and not (quick and world == 1)
            out.append(pytest.param(f"{path}-tp{world}", marks=[pytest.mark.slow] if slow else []))
    return out


def crossed(
    implementations: Sequence[Any], keys_of: Callable[[str], Sequence[tuple[Any, ...]]]
) -> list[Any]:
    """Parameters (implementation, *key) of a test: each of `implementations` with the keys that it
    is tried in, and its marks."""
    out: list[Any] = []
    for given in implementations:
        (name,), marks = (given.values, given.marks) if hasattr(given, "marks") else ((given,), ())
        for key in keys_of(name):
            words = [str(part).removeprefix("torch.") for part in (name, *key)]
            out.append(pytest.param(name, *key, marks=marks, id="-".join(words)))
    return out


def shift_of(name: str) -> int:
    """A number of an implementation that is odd for every other one: what a covering design starts
    from, so that what one implementation leaves out another one has."""
    if name == "reference":
        return 0
    path, world = name.split("-tp")
    return PATHS.index(path) + int(world)


def results_of(name: str, cases: Sequence[Case]) -> list[dict[str, Any] | None]:
    """The results of an implementation; None for fp64 logits under Triton, whose kernels compute in
    fp32."""
    if name == "reference":
        return [run_reference(case) for case in cases]
    path, world = name.split("-tp")
    can = [path != "triton" or case.logits.dtype != torch.float64 for case in cases]
    done = iter(
        computed(int(world), [case for case, fits in zip(cases, can, strict=True) if fits], path)
    )
    return [next(done) if fits else None for fits in can]


def check_or_skip(
    case: Case, result: dict[str, Any] | None, tolerance: float | None = None
) -> None:
    """`check`; a result that cannot be is skipped."""
    if result is None:
        pytest.skip("the kernels compute in fp32")
    check(case, result, tolerance)


def gathered(per_rank: Sequence[Sequence[dict[str, Any]]]) -> list[dict[str, Any]]:
    """One result a case: per-token fields must be equal to the bit on all ranks, gradients are put
    together."""
    out = []
    for results in zip(*per_rank, strict=True):
        for other in results[1:]:
            for key in results[0].keys() - {"grad"}:
                assert torch.equal(results[0][key].nan_to_num(-7), other[key].nan_to_num(-7)), (
                    f"ranks differ in {key}"
                )
        out.append(results[0] | {"grad": torch.cat([r["grad"] for r in results], -1)})
    return out


@dataclass(frozen=True)
class Truth:
    """What `run` should have given, fp64, [...] and [..., W]."""

    expected: published.Expected
    supervised: Tensor
    loss: Tensor
    grad: Tensor


def truth(case: Case) -> Truth:
    """What published.py says about a case."""
    v, shape = case.vocab_size, case.labels.shape
    leaf = case.logits[..., :v].double().reshape(-1, v).requires_grad_()
    z = case.logit_scale * leaf
    flat = case.labels.reshape(-1)
    supervised = flat != -100
    if case.bad_rows is not None:
        supervised = supervised & ~case.bad_rows.reshape(-1)
    y = flat.clamp(min=0)
    batch = published.Batch(z, y)
    if isinstance(case.teacher, TeacherTopK):
        t = case.teacher
        mass = None if t.tail_logmass is None else t.tail_logmass.reshape(-1)
        log_t = published.topk_teacher(
            t.ids.flatten(0, -2), t.logprobs.flatten(0, -2), v, t.tail, mass
        )
        batch = replace(batch, log_t=log_t)
        if t.label_logprobs is not None:
            batch = replace(batch, log_ref=t.label_logprobs.reshape(-1).double())
    elif case.teacher is not None:
        log_t = torch.log_softmax(case.teacher[..., :v].double().reshape(-1, v), -1)
        batch = replace(batch, log_t=log_t, log_ref=batch.at_y(log_t))
    if case.reference_logprobs is not None:
        batch = replace(batch, log_ref=case.reference_logprobs.reshape(-1).double())
    if case.sequence_ids is not None:
        assert batch.log_ref is not None
        # tokens of other objectives may have no reference
        counted, ids = supervised & ~batch.log_ref.isnan(), case.sequence_ids.reshape(-1)
        batch = replace(
            batch, sequence_log_ratio=published.sequence_log_ratio(batch.detached(), ids, counted)
        )

    index = torch.zeros_like(flat) if case.index is None else case.index.reshape(-1)
    members = [
        (
            name,
            {
                k: p.double().broadcast_to(shape).reshape(-1) if isinstance(p, Tensor) else p
                for k, p in given.items()
            },
        )
        for name, given in case.members
    ]
    kept = published.expected(batch.rows(supervised), *rows_of_members(members, index, supervised))
    weights = (
        torch.ones(len(flat)).double()
        if case.token_weights is None
        else case.token_weights.reshape(-1).double()
    )
    upstream = case.upstream.reshape(-1).double()
    objective = (weights[supervised] * upstream[supervised] * kept.published).sum()
    grad = torch.zeros(len(flat), case.logits.shape[-1], dtype=torch.float64)
    if supervised.any():
        grad[:, :v] = torch.autograd.grad(objective, leaf)[0]

    def full(values: Tensor) -> Tensor:
        return torch.zeros(len(flat), dtype=torch.float64).masked_scatter(
            supervised, values.detach()
        )

    everywhere = published.Expected(**{key: full(value) for key, value in vars(kept).items()})
    return Truth(everywhere, supervised, full(weights[supervised] * kept.loss), grad)


def rows_of_members(
    members: Sequence[tuple[str, dict[str, Any]]], index: Tensor, chosen: Tensor
) -> tuple[list[tuple[str, dict[str, Any]]], Tensor]:
    """Per-token parameters and the index of the chosen tokens."""
    rows = [
        (n, {k: p[chosen] if isinstance(p, Tensor) and p.dim() else p for k, p in given.items()})
        for n, given in members
    ]
    return rows, index[chosen]


def ulp(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance to the next number of `dtype` at |x|, as fp64."""
    info = torch.finfo(dtype)
    return torch.exp2(torch.floor(torch.log2(x.abs().clamp(min=info.tiny)))) * info.eps


def check(case: Case, result: dict[str, Any], tolerance: float | None = None) -> None:
    """Values, gradients, coefficients and KL of one call against the truth, at the precision of the
    logits' type."""
    t = truth(case)
    dtype = case.logits.dtype
    tolerance = tolerance or (1e-10 if dtype == torch.float64 else 1e-5)
    want = t.expected
    upstream = case.upstream.reshape(-1).double()
    factor = upstream * case.logit_scale
    if case.token_weights is not None:
        factor = factor * case.token_weights.reshape(-1).double()
    factor = factor.abs().masked_fill(~t.supervised, 0)
    where = f"{case.members} {dtype}"

    assert result["loss"].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert result["loss"].shape == case.labels.shape and result["grad"].dtype == dtype
    assert torch.equal(result["supervised"].reshape(-1), t.supervised), where
    close(result["loss"], t.loss, tolerance * t.loss.abs().clamp(min=1), f"loss of {where}")
    for key in ("imitation", "residual", "nll", *case.diagnostics):
        value = getattr(want, key)
        close(
            result[key],
            value,
            tolerance * value.abs().clamp(min=1).nan_to_num(1),
            f"{key} of {where}",
        )

    size = torch.maximum(
        want.imitation.abs() + want.residual.abs(), want.residual.abs() * want.largest_pi
    )
    allowed = tolerance * (size * factor)[:, None]
    if dtype in (torch.bfloat16, torch.float16):
        allowed = torch.maximum(allowed, ulp(t.grad, dtype))
    allowed = allowed + torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).tiny
    grad = result["grad"].reshape(t.grad.shape)
    close(grad, t.grad, allowed.broadcast_to(grad.shape), f"gradient of {where}")
    assert not grad[factor == 0].any() and not grad[:, case.vocab_size :].any(), (
        f"gradient that must be zero: {where}"
    )
    assert not result["loss"].reshape(-1)[~t.supervised].any(), f"loss of an ignored token: {where}"


def close(got: Tensor, want: Tensor, allowed: Tensor, what: str) -> None:
    """|got - want| <= allowed everywhere, NaN exactly where NaN is wanted; the message names the
    worst element."""
    assert torch.isfinite(allowed).all(), "a tolerance that is not finite would allow anything"
    got = got.detach().double().reshape(want.shape)
    same_nan = torch.isnan(got) == torch.isnan(want)
    excess = torch.where(torch.isnan(want), torch.zeros_like(want), (got - want).abs() - allowed)
    excess = torch.where(same_nan, excess, torch.full_like(excess, torch.inf))
    if excess.numel() and excess.max() > 0:
        i = int(excess.argmax())
        raise AssertionError(
            f"{what}: element {i} is {got.flatten()[i]:.17g}, not {want.flatten()[i]:.17g} (allowed"
            f" {allowed.flatten()[i]:.3g}); {int((excess > 0).sum())} of {excess.numel()} are off"
        )
