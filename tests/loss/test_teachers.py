"""Every kind of teacher record, dense and top-k, on 1, 2 and 4 shards, against the same teacher
written out densely."""

import functools
import itertools
from dataclasses import dataclass, replace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from megatron_tsft import TeacherTopK
from tests.covering import met
from tests.loss.cases import (
    NEEDS_REFERENCE,
    NEEDS_TEACHER,
    Case,
    check,
    crossed,
    garbage_padding,
    implementations,
    random_case,
    results_of,
    run,
    shift_of,
)

WIDTH, VOCABULARY = 20, 17  # 4 ranks: the last shard has 2 tokens and 3 columns of padding


@dataclass(frozen=True)
class TopK:
    """How to make a TeacherTopK."""

    k: int = 4
    tail: Literal["uniform", "drop"] = "uniform"
    known: bool = False  # label_logprobs and tail_logmass are given
    ids: torch.dtype = torch.int64
    logprobs: torch.dtype = torch.float32
    padding: int = 0  # ids of -1 at the end of every other row
    lowest: bool = False  # all ids in the first rank's shard


KINDS = {
    "uniform": TopK(),
    "uniform-cached": TopK(
        known=True, ids=torch.int32, logprobs=torch.float16
    ),  # as the cache stores it
    "uniform-padded": TopK(padding=2, ids=torch.int32),
    "uniform-all-padding": TopK(k=2, padding=2),  # nothing is known: T is uniform
    "uniform-no-k": TopK(k=0),
    "drop": TopK(tail="drop"),
    "drop-cached": TopK(tail="drop", known=True, ids=torch.int32, logprobs=torch.float16),
    "drop-padded": TopK(tail="drop", padding=3),
    "drop-one": TopK(tail="drop", k=1),
    "one-rank": TopK(lowest=True),
    "one-rank-drop": TopK(lowest=True, tail="drop", logprobs=torch.float64),
    "whole-vocabulary": TopK(k=VOCABULARY),  # no tail is left
}
DENSE = {"dense-fp64": torch.float64, "dense-fp32": torch.float32, "dense-bf16": torch.bfloat16}
OFFSET = {"dense-fp64": 3.0, "dense-fp32": -1e4, "dense-bf16": 0.0}


def top_k(kind: TopK, case: Case, seed: int) -> TeacherTopK:
    """The teacher behind it is random, near the student, and known at k tokens: among them the
    label, half the time."""
    g = torch.Generator().manual_seed(1000 + seed)
    lead = case.labels.shape
    student = case.logits[..., :VOCABULARY].double()
    log_t = torch.log_softmax(
        student + torch.randn(*lead, VOCABULARY, generator=g, dtype=torch.float64), -1
    )
    rank_of = log_t.clone()
    if kind.lowest:
        rank_of[..., WIDTH // 4 :] = -torch.inf
    ids = rank_of.topk(kind.k, -1).indices
    logprobs = log_t.gather(-1, ids)
    mass = torch.log1p(-logprobs.exp().sum(-1).clamp(max=1 - 1e-9))
    if kind.padding:
        padded = torch.arange(kind.k) >= kind.k - kind.padding
        ids[::2] = torch.where(padded, -1, ids[::2])
        logprobs[::2] = torch.where(
            padded, torch.nan, logprobs[::2]
        )  # what lies there must not matter
    return TeacherTopK(
        ids.to(kind.ids),
        logprobs.to(kind.logprobs),
        tail=kind.tail,
        label_logprobs=log_t.gather(-1, case.labels.clamp(min=0)[..., None])[..., 0]
        if kind.known
        else None,
        tail_logmass=mass.float() if kind.known else None,
    )


def teacher_case(name: str, kind: str, dtype: torch.dtype, seed: int, variant: str) -> Case:
    case = random_case(name, seed, width=WIDTH, vocab_size=VOCABULARY, dtype=dtype, variant=variant)
    case = replace(case, diagnostics=("entropy", "kl"), reference_logprobs=None)
    if kind in KINDS:
        return replace(case, teacher=top_k(KINDS[kind], case, seed))
    noise = torch.randn(
        case.logits.shape, generator=torch.Generator().manual_seed(1000 + seed), dtype=torch.float64
    )
    logits = OFFSET[kind] + 2 * noise  # not normalised: a constant per token must not matter
    return replace(case, teacher=garbage_padding(logits.to(DENSE[kind]), VOCABULARY))


COMBINATIONS = [
    (name, kind)
    for name in NEEDS_TEACHER + NEEDS_REFERENCE
    for kind in list(KINDS) + list(DENSE)
    if name in NEEDS_TEACHER or kind in DENSE or KINDS[kind].known
]
DTYPES, VARIANTS = (torch.float64, torch.float32), ("plain", "rich")
Results = dict[Any, tuple[Case, dict[str, Any] | None]]


def manner_of(name: str, kind: str, implementation: str) -> tuple[torch.dtype, str]:
    """The type and the variant that an objective and a kind of record are tried in. Type and
    variant change at different paces along both, so that one implementation meets every pair of
    the four. The kernels have fp32 alone."""
    i = (NEEDS_TEACHER + NEEDS_REFERENCE).index(name)
    j = [*KINDS, *DENSE].index(kind)
    shift = shift_of(implementation)
    fp32_alone = implementation.startswith("triton")
    return DTYPES[fp32_alone or (i + j + shift) % 2], VARIANTS[(i + j // 2 + shift // 2) % 2]


WORLDS = (1, 2, 4)


def combinations_of(implementation: str) -> list[tuple[str, str]]:
    """What an implementation is tried in: all, but for the kernels, whose interpreter is slow, a
    third on each number of ranks, by turns along objectives and along kinds."""
    if not implementation.startswith("triton"):
        return COMBINATIONS
    names, kinds = NEEDS_TEACHER + NEEDS_REFERENCE, [*KINDS, *DENSE]
    turn = WORLDS.index(int(implementation[-1]))
    return [
        (name, kind)
        for name, kind in COMBINATIONS
        if (names.index(name) + kinds.index(kind)) % len(WORLDS) == turn
    ]


@pytest.mark.parametrize("name", ["reference", "torch-tp1", "torch-tp2", "fused-tp4"])
def test_every_pair_is_met(name: str) -> None:
    rows = [(*key, *manner_of(*key, name)) for key in COMBINATIONS]
    product = [
        (*key, *rest) for key in COMBINATIONS for rest in itertools.product(DTYPES, VARIANTS)
    ]
    assert met(rows, 2) == met(product, 2)


def test_every_pair_is_met_by_the_kernels() -> None:
    """Each number of ranks meets every objective, every kind and both variants; together they meet
    every pair of them."""
    rows = [
        (*key, world, manner_of(*key, f"triton-tp{world}")[1])
        for world in WORLDS
        for key in combinations_of(f"triton-tp{world}")
    ]
    product = [
        (*key, *rest) for key in COMBINATIONS for rest in itertools.product(WORLDS, VARIANTS)
    ]
    assert met(rows, 2) == met(product, 2)


@functools.lru_cache(maxsize=1)  # the cases of one implementation come one after the other
def results(implementation: str) -> Results:
    cases, keys = [], combinations_of(implementation)
    for key in keys:
        dtype, variant = manner_of(*key, implementation)
        cases.append(teacher_case(*key, dtype, COMBINATIONS.index(key), variant))
    return dict(zip(keys, zip(cases, results_of(implementation, cases), strict=True), strict=True))


@pytest.mark.parametrize(
    ("implementation", "name", "kind"), crossed(implementations(*WORLDS), combinations_of)
)
def test_teacher(implementation: str, name: str, kind: str) -> None:
    case, result = results(implementation)[name, kind]
    assert result is not None
    check(case, result)


def test_top_k_of_the_whole_vocabulary_is_the_dense_teacher() -> None:
    """The same loss and gradient from the two kinds of record."""
    dense = teacher_case("target-sft", "dense-fp64", torch.float64, seed=3, variant="rich")
    assert isinstance(dense.teacher, Tensor)
    log_t = torch.log_softmax(dense.teacher[..., :VOCABULARY], -1)
    ids = torch.arange(VOCABULARY).expand(log_t.shape)
    sparse = run(replace(dense, teacher=TeacherTopK(ids, log_t, "drop")))
    for key, value in run(dense).items():
        torch.testing.assert_close(sparse[key], value, rtol=1e-12, atol=1e-12)
