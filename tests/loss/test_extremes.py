"""Where floating point bites: huge or equal logits, certain tokens, empty shards, no support, no
tokens, no NaN."""

import functools
import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_tsft import TeacherTopK
from tests.covering import met
from tests.loss.cases import (
    NEEDS_REFERENCE,
    NEEDS_TEACHER,
    PATHS,
    Case,
    check,
    computed,
    crossed,
    garbage_padding,
    implementations,
    random_case,
    results_of,
    run,
    run_reference,
    truth,
)
from tests.loss.published import NAMES

DTYPES = [torch.float64, torch.float32, torch.bfloat16]
WIDTH, VOCABULARY = 12, 9


def base(
    name: str, dtype: torch.dtype, seed: int, width: int = WIDTH, vocab_size: int = VOCABULARY
) -> Case:
    case = random_case(name, seed, width=width, vocab_size=vocab_size, dtype=dtype, variant="plain")
    return replace(case, diagnostics=("entropy", "kl"))


def with_logits(case: Case, logits: Tensor) -> Case:
    """Other logits [..., V] in the case's type; reference log-probs stay near the student's, as
    proximal needs."""
    logits = logits.to(case.logits.dtype)
    reference = case.reference_logprobs
    if reference is not None:
        log_p = torch.log_softmax(logits.double(), -1).gather(
            -1, case.labels.clamp(min=0)[..., None]
        )[..., 0]
        reference = log_p + 0.3 * torch.sin(torch.arange(log_p.numel()).double()).reshape(
            log_p.shape
        )
    padded = torch.zeros(case.logits.shape, dtype=logits.dtype)
    padded[..., : case.vocab_size] = logits
    return replace(
        case, logits=garbage_padding(padded, case.vocab_size), reference_logprobs=reference
    )


def noise(case: Case, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*case.labels.shape, case.vocab_size, generator=g, dtype=torch.float64)


def labelled(case: Case) -> Tensor:
    return torch.nn.functional.one_hot(case.labels.clamp(min=0), case.vocab_size).double()


# what the logits [..., V] are; each also meets the label anywhere
LOGITS: dict[str, Callable[[Case], Tensor]] = {
    "plus-minus-1e4": lambda case: 1e4 * torch.sign(noise(case)) + noise(case, 1),
    "offset-1e4": lambda case: 1e4 + noise(case),
    "offset-minus-1e4": lambda case: -1e4 + noise(case),
    "all-equal": lambda case: torch.full_like(noise(case), 3.0),
    "all-zero": lambda case: torch.zeros_like(noise(case)),
    "p-is-one": lambda case: noise(case) + 2000 * labelled(case),
    "p-is-zero": lambda case: noise(case) - 2000 * labelled(case),
    "p-near-one": lambda case: noise(case) + 18 * labelled(case),  # 1 - p is about 1e-7
}


def logits_case(name: str, logits: str, dtype: torch.dtype) -> Case:
    case = base(name, dtype, seed=3)
    return with_logits(case, LOGITS[logits](case))


LOGITS_GRID = list(itertools.product(NAMES, LOGITS))
# where each implementation starts in the round of types
STARTS = {
    "torch-tp1": 0,
    "torch-tp3": 1,
    "fused-tp1": 2,
    "fused-tp3": 0,
    "triton-tp1": 0,
    "triton-tp3": 1,
}


def dtype_of(name: str, logits: str, implementation: str) -> torch.dtype:
    """The type that an objective and logits are tried in; the kernels have no fp64. The types go
    round along objectives and along logits, so that one implementation meets every objective and
    all logits in every type. Implementations start at different types, so that torch and the fused
    head, whose code is one, meet all triples together, and the kernels by themselves."""
    types = DTYPES[1:] if implementation.startswith("triton") else DTYPES
    place = NAMES.index(name) + list(LOGITS).index(logits) + STARTS[implementation]
    return types[place % len(types)]


def logits_of(implementation: str) -> list[tuple[str, str]]:
    """What an implementation is tried in: all, but for the kernels, whose interpreter is slow, half
    on one rank and half on three: the first two of four along objectives and along logits."""
    if not implementation.startswith("triton"):
        return LOGITS_GRID
    turn = 0 if implementation.endswith("tp1") else 1
    places = {key: NAMES.index(key[0]) + list(LOGITS).index(key[1]) for key in LOGITS_GRID}
    return [key for key, place in places.items() if place // 2 % 2 == turn]


def test_every_pair_is_met() -> None:
    """One implementation meets every pair of objective, logits and type (of the kernels', one and
    three ranks together); those that share code all triples, the kernels all pairs with the number
    of ranks."""
    grids = {name: [(*key, dtype_of(*key, name)) for key in logits_of(name)] for name in STARTS}
    product = list(itertools.product(NAMES, LOGITS, DTYPES))
    shared = [grid for name, grid in grids.items() if not name.startswith("triton")]
    assert all(met(grid, 2) == met(product, 2) for grid in shared)
    assert met(itertools.chain(*shared), 3) == met(product, 3)
    kernels = [(*row, world) for world in (1, 3) for row in grids[f"triton-tp{world}"]]
    product = list(itertools.product(NAMES, LOGITS, DTYPES[1:], (1, 3)))
    assert met(kernels, 2) == met(product, 2)


@functools.lru_cache(maxsize=1)  # the cases of one implementation come one after the other
def logits_results(implementation: str) -> dict[Any, tuple[Case, dict[str, Any] | None]]:
    keys = logits_of(implementation)
    cases = [logits_case(*key, dtype_of(*key, implementation)) for key in keys]
    return dict(zip(keys, zip(cases, results_of(implementation, cases), strict=True), strict=True))


def finite(case: Case, result: dict[str, Any]) -> None:
    for key in ("loss", "nll", "imitation", "residual", "entropy", "grad"):
        if key in result:
            assert torch.isfinite(result[key]).all(), (
                f"{key} of {case.members} is not finite: {result[key]}"
            )


@pytest.mark.parametrize(
    ("implementation", "name", "logits"),
    crossed([it for it in implementations(1, 3) if it != "reference"], logits_of),
)
def test_logits(implementation: str, name: str, logits: str) -> None:
    case, result = logits_results(implementation)[name, logits]
    assert result is not None
    dtype = case.logits.dtype
    finite(case, result)
    # two log-probs of -2e4 in fp32 are each off by an ulp, 2e-3, and the exponential of their
    # difference is as well
    spacing = (
        4 * 2.0**-23 * float(result["nll"].max())
        if name in NEEDS_REFERENCE and dtype != torch.float64
        else 0
    )
    check(case, result, tolerance=max(spacing, 1e-10 if dtype == torch.float64 else 1e-5))


# ---- shapes


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("world", "width", "vocabulary"), [(1, 1, 1), (1, 4, 1)])
def test_vocabulary_of_one_token(name: str, world: int, width: int, vocabulary: int) -> None:
    case = base(name, torch.float32, seed=5, width=width, vocab_size=vocabulary)
    result = run(case)
    finite(case, result)
    assert not result["grad"].any() and not result["nll"].any()


SHARDS = {
    "one-token-shards": (4, 4),
    "one-token-shards-and-padding": (4, 3),
    "shards-of-padding": (12, 5),
}


@pytest.mark.parametrize("path", ["torch", "fused", pytest.param("triton", marks=pytest.mark.slow)])
def test_tiny_and_empty_shards(path: str) -> None:
    """TP 4: one column a rank, the last of it padding, and two ranks with nothing but padding. The
    two types by turns along both, so that each objective and each shape meets them; the kernels,
    whose interpreter is slow, get one shape an objective, by turns."""
    types = [torch.float32] if path == "triton" else [torch.float64, torch.float32]
    grid = [
        (name, shape, types[(i + j + PATHS.index(path)) % len(types)])
        for i, name in enumerate(NAMES)
        for j, shape in enumerate(SHARDS)
        if path != "triton" or i % len(SHARDS) == j
    ]
    size = 1 if path == "triton" else 2
    assert met(grid, size) == met(itertools.product(NAMES, SHARDS, types), size)
    cases = [
        replace(base(name, dtype, NAMES.index(name), *SHARDS[shape]), diagnostics=("entropy", "kl"))
        for name, shape, dtype in grid
    ]
    # a top-k teacher too, whose ids leave most ranks without any
    for name in NEEDS_TEACHER:
        for tail in ("drop", "uniform"):
            case = base(name, torch.float64, 1, *SHARDS["shards-of-padding"])
            ids = torch.tensor([0, 1]).expand(*case.labels.shape, 2)
            logprobs = torch.tensor([0.5, 0.3]).log().expand(ids.shape)
            cases.append(replace(case, teacher=TeacherTopK(ids, logprobs, tail)))
    for case, result in zip(cases, results_of(f"{path}-tp4", cases), strict=True):
        if result is not None:
            finite(case, result)
            check(case, result)


def test_zero_tokens() -> None:
    """Every objective on no tokens at all, also in a group: empty results and an empty gradient."""
    cases = []
    for name in NAMES:
        case = base(name, torch.float32, seed=1)
        for shape in ((0,), (0, 3)):
            cases.append(
                replace(
                    case,
                    logits=torch.zeros(*shape, WIDTH),
                    labels=torch.zeros(shape, dtype=torch.int64),
                    upstream=torch.zeros(shape),
                    teacher=None if case.teacher is None else torch.zeros(*shape, WIDTH),
                    reference_logprobs=None
                    if case.reference_logprobs is None
                    else torch.zeros(shape),
                    token_weights=None if case.token_weights is None else torch.zeros(shape),
                    sequence_ids=None
                    if case.sequence_ids is None
                    else torch.zeros(shape, dtype=torch.int64),
                )
            )
    for world in (1, 2):
        for case, result in zip(cases, computed(world, cases), strict=True):
            assert (
                result["loss"].shape == case.labels.shape
                and result["grad"].shape == case.logits.shape
            )
            assert result["bad_teacher_rows"] == 0
    no_sequence_known = replace(
        next(c for c in cases if c.members[0][0] == "iw-sft"), num_sequences=None
    )
    assert run(no_sequence_known)["loss"].shape == (0,)


def test_a_single_token_without_leading_dimensions() -> None:
    case = base("target-sft", torch.float64, seed=2)
    assert isinstance(case.teacher, Tensor)
    one = replace(
        case,
        logits=case.logits[0, 0],
        teacher=case.teacher[0, 0],
        labels=torch.tensor(4),
        upstream=torch.tensor(1.5),
    )
    check(one, run(one))


def test_all_labels_ignored() -> None:
    for name in NAMES:
        case = base(name, torch.float32, seed=1)
        case = replace(case, labels=torch.full_like(case.labels, -100))
        result = run(case)
        finite(case, result)
        assert (
            not result["loss"].any() and not result["grad"].any() and not result["supervised"].any()
        )


@pytest.mark.parametrize("world", [1, 2])
def test_garbage_at_ignored_labels(world: int) -> None:
    """Whatever lies at a token that is not supervised, its loss and gradient are zero and the
    others' are unharmed."""
    cases = []
    for name in NAMES:
        case = base(name, torch.float32, seed=6)
        ignored = case.labels == -100
        assert 0 < ignored.sum() < ignored.numel()
        spoil = torch.tensor([torch.nan, torch.inf, -torch.inf])
        garbage = spoil.repeat(ignored.numel())[: int(ignored.sum())].double()
        changes = {}
        for key in ("logits", "teacher", "reference_logprobs", "token_weights", "upstream"):
            value = getattr(case, key)
            if isinstance(value, Tensor):
                changes[key] = value.clone()
                changes[key][ignored] = garbage.to(value.dtype)[
                    (...,) + (None,) * (value.dim() - 2)
                ]
        cases.append(replace(case, **changes))
    for case, result in zip(cases, computed(world, cases), strict=True):
        finite(case, result)
        check(case, result)
        assert result["bad_teacher_rows"] == 0


# ---- teachers and parameters


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0, "per-token"])
def test_teacher_without_support(eta: float | str, dtype: torch.dtype) -> None:
    """Log-probs of -inf, at the label too: 0 * (-inf) must be 0, whether eta or the teacher's
    probability is 0."""
    case = base("target-sft", dtype, seed=4)
    given = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64) if eta == "per-token" else eta
    teacher = noise(case).masked_fill(noise(case, 2) > 0, -torch.inf)
    teacher[..., 0] = 0  # at least one token has support
    padded = torch.zeros(case.logits.shape, dtype=dtype)
    padded[..., :VOCABULARY] = teacher
    cases = [
        replace(
            case,
            members=[("target-sft", {"eta": given})],
            teacher=garbage_padding(padded, VOCABULARY),
        ),
        *(replace(base(name, dtype, seed=4), teacher=padded) for name in NEEDS_TEACHER),
    ]
    for world in (1, 3):
        for member, result in zip(cases, computed(world, cases), strict=True):
            finite(member, result)
            check(member, result)


@pytest.mark.parametrize("world", [1, 2])
def test_unused_teacher_rows_may_be_anything(world: int) -> None:
    """eta per token, 0 in places: NaN and infinities of the teacher there change nothing and are
    not counted."""
    case = base("target-sft", torch.float64, seed=6)
    eta = torch.zeros(case.labels.shape, dtype=torch.float64)
    eta[::2] = 0.7
    assert isinstance(case.teacher, Tensor)
    teacher = case.teacher.clone()
    teacher[1::2, :, 3], teacher[3] = torch.nan, torch.inf
    case = replace(case, members=[("target-sft", {"eta": eta})])
    [spoiled] = computed(world, [replace(case, teacher=teacher)])
    [clean] = computed(world, [case])
    check(case, spoiled)
    assert spoiled["bad_teacher_rows"] == 0
    for key, value in clean.items():
        assert torch.equal(spoiled[key], value), key


@pytest.mark.parametrize("beta", [0.0, 1e-6, 100.0])
def test_gift_at_the_ends_of_beta(beta: float) -> None:
    for dtype in (torch.float64, torch.float32):
        case = replace(base("gift", dtype, seed=2), members=[("gift", {"beta": beta})])
        check(case, run(case))


@pytest.mark.parametrize("logp_y", [-95.0, -torch.inf])
def test_gift_at_a_label_that_the_teacher_excludes(logp_y: float) -> None:
    """exp(100) overflows fp32, but T(y) exp(100) does not: with log T(y) = -95 the label gets
    sigmoid(5)."""
    for dtype in (torch.float64, torch.float32):
        case = replace(base("gift", dtype, seed=2), members=[("gift", {"beta": 100.0})])
        assert isinstance(case.teacher, Tensor)
        teacher = case.teacher.clone()
        teacher[..., :VOCABULARY] = torch.log_softmax(teacher[..., :VOCABULARY], -1)
        teacher.scatter_(-1, case.labels.clamp(min=0)[..., None], logp_y)
        case = replace(case, teacher=teacher)
        result = run(case)
        trust = float(result["imitation"].max())
        assert 0.5 < trust < 1 if logp_y == -95 else trust == 0
        check(
            case, result, tolerance=1e-10 if dtype == torch.float64 else 2e-5
        )  # fp32 rounds 95 to 4e-6


def test_gift_beyond_the_range_of_exp() -> None:
    case = replace(base("gift", torch.float32, seed=2), members=[("gift", {"beta": 1000.0})])
    plain = replace(case, members=[("sft", {})], teacher=None)
    for key in ("loss", "grad"):  # all mass is on the label
        torch.testing.assert_close(run(case)[key], run(plain)[key])


@pytest.mark.parametrize("ratio", [-200.0, 200.0, torch.inf])
@pytest.mark.parametrize("name", NEEDS_REFERENCE)
def test_reference_far_from_the_student(name: str, ratio: float) -> None:
    """log p - log p_ref of 200 overflows fp32's exp: proximal's indicator and iw-sft's clamp must
    still hold."""
    for dtype in (torch.float64, torch.float32):
        case = base(name, dtype, seed=3)
        log_p = -truth(case).expected.nll.reshape(case.labels.shape)
        result = run(replace(case, reference_logprobs=log_p - ratio))
        finite(case, result)
        weights = result["imitation"][result["supervised"]]
        if name == "proximal":
            assert float(weights.max()) < 1e-80 and float(result["grad"].abs().max()) < 1e-80
        else:
            end = case.members[0][1]["clip_max" if ratio > 0 else "clip_min"]
            torch.testing.assert_close(weights, torch.full_like(weights, end))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_iw_sft_with_a_reference_that_excludes_the_label(temperature: float) -> None:
    """log p_ref = -inf is a ratio of +inf; at temperature 0 the weight is 1 all the same."""
    case = base("iw-sft", torch.float32, seed=3)
    none = torch.full(case.labels.shape, -torch.inf)
    case = replace(
        case, members=[("iw-sft", {"temperature": temperature})], reference_logprobs=none
    )
    for result in (run(case), run_reference(case)):
        finite(case, result)
        assert (result["imitation"][result["supervised"]] == (16.0 if temperature else 1.0)).all()


def test_top_k_that_says_more_than_everything() -> None:
    """fp16 log-probs may sum to a little over 1: no mass is left for the tail, and nothing is
    NaN."""
    case = base("kd", torch.float32, seed=2)
    ids = torch.arange(4).expand(*case.labels.shape, 4)
    logprobs = torch.full(ids.shape, 0.2502, dtype=torch.float64).log().half()
    case = replace(case, teacher=TeacherTopK(ids, logprobs, "uniform"))
    finite(case, run(case))
    check(case, run(case))


@pytest.mark.parametrize("path", ["torch", "triton"])
def test_logits_of_minus_infinity(path: str) -> None:
    """Excluded tokens: fewer are left than eaft's k, and tokens without a residual meet a uniform
    one's infinity."""
    labels, index = torch.tensor([0, 1, 2, 0]), torch.tensor([0, 1, 2, 3])
    few = torch.randn(4, 12, generator=torch.Generator().manual_seed(0))
    few[:, 3:] = -torch.inf
    members = [("eaft", {"top_k": 7}), ("sft", {}), ("target-sft", {"eta": 0.0}), ("gem", {})]
    case = Case(members, few, labels, torch.ones(4), 12, index=index, diagnostics=("entropy",))
    # what excludes a token by a large number, not by infinity, is the truth
    check(replace(case, logits=few.clamp(min=-1e4)), run(case, path=path))

    mixed = [("sft", {}), ("label-smoothing", {"smoothing": 0.1})]
    one = torch.randn(2, 12, generator=torch.Generator().manual_seed(1))
    one[:, 5] = -torch.inf
    result = run(Case(mixed, one, labels[:2], torch.ones(2), 12, index=index[:2]), path=path)
    nll = -torch.log_softmax(one, -1)[0, 0]
    torch.testing.assert_close(result["loss"][0], nll)
