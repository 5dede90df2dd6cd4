"""TSFT_DEBUG=1 raises on bad labels and teacher rows; without it a bad row has no loss, no
gradient, and is counted."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tsft import TeacherTopK
from tests.loss.cases import Case, call, check, computed, random_case, run, shard_of
from tests.ranks import run_ranks

WIDTH, VOCABULARY = 12, 9
SPOILED = [(0, 1), (3, 0), (4, 2)]  # positions [s, b]


def case_of(name: str, labels_there: bool = True) -> Case:
    case = random_case(
        name, 5, width=WIDTH, vocab_size=VOCABULARY, dtype=torch.float32, variant="plain"
    )
    labels = case.labels.clone()
    for at in SPOILED:
        labels[at] = 4 if labels_there else -100
    rows = torch.zeros(labels.shape, dtype=torch.bool)
    rows[tuple(torch.tensor(SPOILED).T)] = True
    return replace(case, labels=labels, bad_rows=rows)


def dense(case: Case, spoil: Callable[[Tensor], Tensor]) -> Case:
    assert isinstance(case.teacher, Tensor)
    teacher = case.teacher.clone()
    for at in SPOILED:
        spoil(teacher[at])
    return replace(case, teacher=teacher)


def top_k(case: Case, spoil: Callable[[Tensor], Tensor], tail: Literal["drop", "uniform"]) -> Case:
    assert isinstance(case.teacher, Tensor)
    top = torch.log_softmax(case.teacher[..., :VOCABULARY], -1).topk(3, -1)
    for at in SPOILED:
        spoil(top.values[at])
    return replace(case, teacher=TeacherTopK(top.indices, top.values, tail))


def one(value: float) -> Callable[[Tensor], Tensor]:
    return lambda row: row[2:3].fill_(value)  # in the first shard of two


def last(value: float) -> Callable[[Tensor], Tensor]:
    return lambda row: row[8:9].fill_(value)  # in the last shard of two


def whole(value: float) -> Callable[[Tensor], Tensor]:
    return lambda row: row.fill_(value)


def bad_cases(**keywords: Any) -> dict[str, Case]:
    cases = {
        "kd-nan": dense(case_of("kd", **keywords), one(torch.nan)),
        "target-sft-nan-in-the-last-shard": dense(
            case_of("target-sft", **keywords), last(torch.nan)
        ),
        "gift-inf": dense(case_of("gift", **keywords), last(torch.inf)),
        "asft-all-minus-inf": dense(case_of("asft", **keywords), whole(-torch.inf)),
        "kd-hybrid-top-k-nan": top_k(case_of("kd-hybrid", **keywords), one(torch.nan), "uniform"),
        "sft-kl-top-k-inf": top_k(case_of("sft-kl", **keywords), one(torch.inf), "drop"),
        "target-sft-top-k-all-minus-inf": top_k(
            case_of("target-sft", **keywords), whole(-torch.inf), "drop"
        ),
    }
    proximal = case_of("proximal", **keywords)
    iw_sft = case_of("iw-sft", **keywords)
    for name, case in (("proximal", proximal), ("iw-sft", iw_sft)):
        assert case.reference_logprobs is not None and case.bad_rows is not None
        for value in (torch.nan, torch.inf):
            reference = case.reference_logprobs.masked_fill(case.bad_rows, value)
            cases[f"{name}-reference-{value}"] = replace(case, reference_logprobs=reference)
    teacher = case_of("kd").teacher
    from_teacher = dense(
        replace(proximal, reference_logprobs=None, teacher=teacher), one(torch.nan)
    )
    return cases | {"proximal-teacher-nan": from_teacher}


@pytest.mark.parametrize("world", [1, 2])
def test_bad_rows_are_left_out_and_counted(world: int) -> None:
    """Also out of iw-sft's means: published.py computes them without these tokens."""
    cases = bad_cases()
    for name, result in zip(cases, computed(world, list(cases.values())), strict=True):
        assert int(result["bad_teacher_rows"]) == len(SPOILED), name
        assert not result["supervised"][cases[name].bad_rows].any(), name
        check(cases[name], result)


def test_bad_rows_at_ignored_labels_do_not_count() -> None:
    for case in bad_cases(labels_there=False).values():
        assert int(run(case)["bad_teacher_rows"]) == 0
        check(case, run(case))


@pytest.mark.parametrize("name", bad_cases())
def test_debug_raises_on_a_bad_row(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TSFT_DEBUG", "1")
    with pytest.raises(
        ValueError, match=r"3 teacher rows are not finite, at flat token positions \[1, 9, 14\]"
    ):
        run(bad_cases()[name])


def raises_on(rank: int, case: Case) -> str:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ValueError) as caught:
        patch.setenv("TSFT_DEBUG", "1")
        call(case, shard_of(case.logits, rank, 2), rank, 2, dist.group.WORLD)
    return str(caught.value)


def test_debug_raises_on_every_rank() -> None:
    """One rank that raises alone would leave the others waiting."""
    first, second = run_ranks(2, raises_on, bad_cases()["gift-inf"])
    assert first == second and "3 teacher rows" in first


@pytest.mark.parametrize("label", [-1, -101, VOCABULARY, WIDTH, 10**9])
def test_debug_raises_on_a_label_outside(label: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = case_of("sft")
    labels = case.labels.clone()
    labels[2, 1] = label
    monkeypatch.setenv("TSFT_DEBUG", "1")
    message = rf"labels \[{label}\] are outside \[0, {VOCABULARY}\) and are not ignore_index=-100"
    with pytest.raises(ValueError, match=message):
        run(replace(case, labels=labels))


@pytest.mark.parametrize("value", ["", "0"])
def test_debug_is_off(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TSFT_DEBUG", value)
    assert int(run(bad_cases()["kd-nan"])["bad_teacher_rows"]) == 3


@pytest.mark.parametrize("name", ["sft", "kd", "iw-sft", "target-sft"])
def test_debug_changes_no_number(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = case_of(name)
    plain = run(case)
    monkeypatch.setenv("TSFT_DEBUG", "1")
    for key, value in run(case).items():
        assert torch.equal(value.nan_to_num(-7), plain[key].nan_to_num(-7)), key
