"""Several objectives in one batch: each token gets its own objective's loss and gradient, and
nobody else's NaN."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_tsft import TeacherTopK, objectives
from tests.loss.cases import (
    INTERVALS,
    NUMBERS,
    Case,
    check_or_skip,
    implementations,
    random_case,
    results_of,
    run,
)
from tests.loss.published import NAMES

SHAPE = (18, 4)
WIDTH, VOCABULARY = 14, 11
Members = list[tuple[str, dict[str, Any]]]


def mixture_case(
    members: Members, seed: int, dtype: torch.dtype = torch.float64, inputs: str = ""
) -> Case:
    """Tokens follow their members in turn; `inputs` names what there is: teacher, reference,
    weights, sequences."""
    g = torch.Generator().manual_seed(seed)
    case = random_case(
        "sft", seed, width=WIDTH, vocab_size=VOCABULARY, dtype=dtype, variant="plain"
    )

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=g, dtype=torch.float64)

    logits = 2 * normal(*SHAPE, WIDTH)
    labels = torch.randint(0, VOCABULARY, SHAPE, generator=g)
    log_p = torch.log_softmax(logits[..., :VOCABULARY], -1).gather(-1, labels[..., None])[..., 0]
    labels[torch.rand(SHAPE, generator=g) < 0.1] = -100
    return replace(
        case,
        members=members,
        index=(torch.arange(SHAPE[0] * SHAPE[1]) % len(members)).reshape(SHAPE),
        logits=logits.to(dtype),
        labels=labels,
        upstream=normal(*SHAPE),
        teacher=(logits + normal(*SHAPE, WIDTH)).to(dtype) if "teacher" in inputs else None,
        reference_logprobs=log_p + 0.3 * normal(*SHAPE) if "reference" in inputs else None,
        token_weights=torch.rand(SHAPE, generator=g) if "weights" in inputs else None,
        sequence_ids=torch.randint(0, 6, SHAPE, generator=g) if "sequences" in inputs else None,
        num_sequences=6 if "sequences" in inputs else None,
        diagnostics=("entropy", "kl"),
        chunk=60,
    )


def per_token(name: str, seed: int) -> dict[str, Any]:
    g = torch.Generator().manual_seed(seed)
    return {
        key: low + (high - low) * torch.rand(SHAPE, generator=g, dtype=torch.float64)
        for key, (low, high) in INTERVALS.get(name, {}).items()
    }


def top_k(case: Case) -> TeacherTopK:
    assert isinstance(case.teacher, Tensor)
    top = torch.log_softmax(case.teacher[..., :VOCABULARY].double(), -1).topk(3, -1)
    return TeacherTopK(top.indices, top.values, "uniform")


EVERYTHING = "teacher reference weights sequences"
MIXTURES: dict[str, Case] = {
    "everything": mixture_case(
        [(name, NUMBERS.get(name, {})) for name in NAMES], 1, inputs=EVERYTHING
    ),
    "everything-fp32": mixture_case([(name, {}) for name in NAMES], 2, torch.float32, EVERYTHING),
    "everything-per-token": mixture_case(
        [(name, per_token(name, 3)) for name in NAMES], 3, inputs=EVERYTHING
    ),
    "teacher-and-none": mixture_case([("sft", {}), ("kd", {})], 4, inputs="teacher"),
    "two-etas": mixture_case(
        [("target-sft", {"eta": 0.3}), ("target-sft", {"eta": 1.0})], 5, inputs="teacher"
    ),
    "no-teacher-at-all": mixture_case([("target-sft", {"eta": 0.0}), ("gem", {}), ("dft", {})], 6),
    "two-top-ks": mixture_case(
        [("eaft", {"top_k": 3}), ("sft", {}), ("eaft", {"top_k": 7, "power": 2})], 7
    ),
    "three-residuals": mixture_case(
        [("label-smoothing", {}), ("gem", {}), ("gift", {})], 8, inputs="teacher"
    ),
    "reference-and-none": mixture_case([("proximal", {}), ("profit", {})], 9, inputs="reference"),
    "reference-of-teacher": mixture_case(
        [("proximal", {}), ("kd-hybrid", {}), ("deft", {})], 10, inputs="teacher"
    ),
    "one-member": mixture_case([("target-sft", {"eta": 0.3})], 11, inputs="teacher"),
}
MIXTURES["top-k"] = replace(
    MIXTURES["teacher-and-none"], teacher=top_k(MIXTURES["teacher-and-none"])
)
MIXTURES["top-k-three-residuals"] = replace(
    MIXTURES["three-residuals"], teacher=top_k(MIXTURES["three-residuals"])
)


def spoiled(case: Case, names: tuple[str, ...]) -> Case:
    """Teacher, reference or both are garbage at the tokens whose objective is in `names`: none of
    these reads them."""
    assert case.index is not None
    chosen = torch.isin(
        case.index, torch.tensor([i for i, (name, _) in enumerate(case.members) if name in names])
    )
    teacher, reference = case.teacher, case.reference_logprobs
    if isinstance(teacher, Tensor):
        teacher = teacher.masked_fill(chosen[..., None], torch.nan)
    elif teacher is not None:
        teacher = replace(
            teacher, logprobs=teacher.logprobs.masked_fill(chosen[..., None], torch.inf)
        )
    if reference is not None:
        reference = reference.masked_fill(chosen, torch.nan)
    return replace(case, teacher=teacher, reference_logprobs=reference)


MIXTURES |= {  # the kernels compute in fp32
    f"{name}-fp32": replace(case, logits=case.logits.float())
    for name, case in list(MIXTURES.items())
    if name
    in (
        "everything-per-token",
        "two-etas",
        "two-top-ks",
        "three-residuals",
        "top-k-three-residuals",
    )
}
READS_NOTHING = ("sft", "dft", "profit", "gem", "label-smoothing", "deft")
MIXTURES |= {
    f"{name}-spoiled": spoiled(MIXTURES[name], READS_NOTHING)
    for name in (
        "everything",
        "everything-fp32",
        "teacher-and-none",
        "reference-and-none",
        "three-residuals",
        "top-k",
    )
}


@pytest.fixture(scope="module", params=implementations(1, 2))
def results(request: pytest.FixtureRequest) -> dict[str, dict[str, Any] | None]:
    # the dense definition needs a whole teacher
    names = [
        name for name in MIXTURES if request.param != "reference" or not name.endswith("spoiled")
    ]
    return dict(
        zip(names, results_of(request.param, [MIXTURES[name] for name in names]), strict=True)
    )


@pytest.mark.parametrize("name", MIXTURES)
def test_mixture(results: dict[str, dict[str, Any] | None], name: str) -> None:
    if name in results:
        result = results[name]
        check_or_skip(MIXTURES[name], result)
        assert result is not None and result["bad_teacher_rows"] == 0


def test_one_member_is_that_objective() -> None:
    mixed, alone = MIXTURES["one-member"], replace(MIXTURES["one-member"], index=None)
    for key, value in run(mixed).items():
        torch.testing.assert_close(run(alone)[key], value, rtol=1e-14, atol=1e-14, equal_nan=True)


def test_requirements_are_those_of_the_members() -> None:
    index = torch.zeros(3, dtype=torch.int64)
    sft, kd, critical = (objectives.get(name) for name in ("sft", "kd", "critical"))
    assert objectives.mixture([sft], index).teacher == "none"
    assert objectives.mixture([sft, objectives.get("target-sft")], index).teacher == "optional"
    assert objectives.mixture([sft, kd], index).teacher == "required"
    assert objectives.mixture([sft, critical], index).requires_token_weights
    assert objectives.mixture([sft, kd], index).name == "mixture(sft, kd)"
