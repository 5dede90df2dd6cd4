"""What must hold for any shape and any numbers: gradients that sum to zero, and objectives that
coincide."""

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_tsft import QTargetOutput, TeacherTopK, objectives, q_target_cross_entropy
from tests.loss.cases import NEEDS_REFERENCE, NEEDS_TEACHER
from tests.loss.published import NAMES

examples = settings(max_examples=40)
finite = st.floats(0, 1)


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    """logits, labels and a teacher of random leading shape, vocabulary, padding, spread and seed;
    fp64."""
    lead = tuple(draw(st.lists(st.integers(1, 5), max_size=3)))
    v, padding = draw(st.integers(1, 40)), draw(st.integers(0, 5))
    spread = draw(st.sampled_from([0.0, 0.1, 1.0, 10.0, 300.0]))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=g, dtype=torch.float64)

    logits = spread * normal(*lead, v + padding)
    labels = torch.randint(0, v, lead, generator=g)
    labels = torch.where(torch.rand(lead, generator=g) < 0.2, -100, labels)
    return dict(
        logits=logits, labels=labels, teacher=logits + normal(*lead, v + padding), vocab_size=v
    )


def solve(problem: dict[str, Any], name: str, **parameters: Any) -> tuple[Tensor, Tensor]:
    """Loss [...] and the gradient of its sum."""
    leaf = problem["logits"].clone().requires_grad_()
    out = call(problem, leaf, name, **parameters)
    out.loss.sum().backward()
    assert leaf.grad is not None
    return out.loss.detach(), leaf.grad


def call(problem: dict[str, Any], logits: Tensor, name: str, **parameters: Any) -> QTargetOutput:
    """With what the objective needs besides logits and labels."""
    keywords: dict[str, Any] = {
        "vocab_size": problem["vocab_size"],
        "diagnostics": ("entropy", "kl"),
    }
    if name in NEEDS_TEACHER and parameters.get("eta", 1) != 0:
        keywords["teacher"] = parameters.pop("teacher", problem["teacher"])
    if name in NEEDS_REFERENCE:
        keywords["reference_logprobs"] = torch.zeros(problem["labels"].shape) - 1
    if name == "iw-sft":
        keywords |= dict(sequence_ids=torch.zeros_like(problem["labels"]), num_sequences=1)
    if name == "critical":
        keywords["token_weights"] = torch.full(problem["labels"].shape, 0.7)
    return q_target_cross_entropy(
        logits, problem["labels"], objectives.get(name, **parameters), **keywords
    )


def same(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> None:
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-11)


@examples
@given(problems(), st.sampled_from(NAMES))
def test_gradients_sum_to_zero_over_the_vocabulary(problem: dict[str, Any], name: str) -> None:
    """Adding a constant to a token's logits changes no probability, so no loss."""
    _, grad = solve(problem, name)
    assert torch.isfinite(grad).all()
    assert grad.sum(-1).abs().max() < 1e-11 * max(1, grad.abs().max())


@examples
@given(problems(), st.sampled_from(NAMES))
def test_diagnostics_keep_their_bounds(problem: dict[str, Any], name: str) -> None:
    """0 <= H <= log V and KL >= 0, where there is a KL."""
    out = call(problem, problem["logits"], name)
    assert out.entropy is not None and out.kl is not None
    log_v = torch.tensor(problem["vocab_size"], dtype=torch.float64).log()
    assert ((out.entropy > -1e-12) & (out.entropy < log_v + 1e-12)).all()
    assert (out.kl.nan_to_num(0) > -1e-10).all()


@examples
@given(problems(), st.sampled_from(NAMES), st.floats(-1e3, 1e3))
def test_a_constant_on_the_logits_changes_nothing(
    problem: dict[str, Any], name: str, shift: float
) -> None:
    shifted = problem | {"logits": problem["logits"] + shift, "teacher": problem["teacher"] - shift}
    for x, y in zip(solve(problem, name), solve(shifted, name), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9)


@examples
@given(problems(), st.randoms(use_true_random=False), st.sampled_from(NAMES))
def test_the_order_of_the_vocabulary_does_not_matter(
    problem: dict[str, Any], random: Any, name: str
) -> None:
    v = problem["vocab_size"]
    order = list(range(v))
    random.shuffle(order)
    columns = order + list(range(v, problem["logits"].shape[-1]))
    place = torch.tensor(order).argsort()
    labels = torch.where(problem["labels"] < 0, -100, place[problem["labels"].clamp(min=0)])
    moved = {
        "logits": problem["logits"][..., columns],
        "teacher": problem["teacher"][..., columns],
        "labels": labels,
    }
    loss, grad = solve(problem, name)
    same((loss, grad[..., columns]), solve(problem | moved, name))


@examples
@given(problems())
def test_target_sft_without_teacher_has_dfts_gradient(problem: dict[str, Any]) -> None:
    torch.testing.assert_close(
        solve(problem, "target-sft", eta=0)[1], solve(problem, "dft")[1], rtol=1e-10, atol=1e-11
    )


@examples
@given(problems(), finite)
def test_target_sft_taught_by_itself_has_dfts_gradient(problem: dict[str, Any], eta: float) -> None:
    """pi = p whatever eta is; the state of a run with a reference teacher at its first step."""
    itself = problem | {"teacher": problem["logits"]}
    torch.testing.assert_close(
        solve(itself, "target-sft", eta=eta)[1], solve(problem, "dft")[1], rtol=1e-9, atol=1e-10
    )


@examples
@given(problems())
def test_kd_from_itself_has_no_gradient(problem: dict[str, Any]) -> None:
    _, grad = solve(problem | {"teacher": problem["logits"] + 5}, "kd")
    assert grad.abs().max() < 1e-12


@examples
@given(problems(), finite)
def test_kd_hybrid_is_between_sft_and_kd(problem: dict[str, Any], weight: float) -> None:
    sft, kd = solve(problem, "sft"), solve(problem, "kd")
    same(solve(problem, "kd-hybrid", teacher_weight=0), sft)
    same(solve(problem, "kd-hybrid", teacher_weight=1), kd)
    loss, grad = ((1 - weight) * x + weight * y for x, y in zip(sft, kd, strict=True))
    same(solve(problem, "kd-hybrid", teacher_weight=weight), (loss, grad))


@examples
@given(problems())
def test_objectives_that_end_in_sft(problem: dict[str, Any]) -> None:
    sft = solve(problem, "sft")
    for name, parameters in {
        "label-smoothing": dict(smoothing=0),
        "beyond-log": dict(alpha=0),
        "eaft": dict(power=0),
        "sft-kl": dict(kl_weight=0),
        "idft": dict(weight_min=1),
        "iw-sft": dict(temperature=0),
    }.items():
        same(solve(problem, name, **parameters), sft)
    same(solve(problem, "asft", kl_weight=0), solve(problem, "dft"))
    same(solve(problem, "beyond-log"), solve(problem, "dft"))  # p^1


@examples
@given(problems())
def test_gift_without_trust_is_kd(problem: dict[str, Any]) -> None:
    same(solve(problem, "gift", beta=0), solve(problem, "kd"))


@examples
@given(problems(), finite)
def test_label_smoothing_is_kd_from_a_uniform_teacher(
    problem: dict[str, Any], smoothing: float
) -> None:
    flat = problem | {"teacher": torch.zeros_like(problem["teacher"])}
    same(
        solve(problem, "label-smoothing", smoothing=smoothing),
        solve(flat, "kd-hybrid", teacher_weight=smoothing),
    )


@examples
@given(problems(), st.sampled_from(["drop", "uniform"]), st.sampled_from(NEEDS_TEACHER))
def test_a_top_k_of_everything_is_the_dense_teacher(
    problem: dict[str, Any], tail: Any, name: str
) -> None:
    v = problem["vocab_size"]
    log_t = torch.log_softmax(problem["teacher"][..., :v], -1)
    ids = torch.arange(v, dtype=torch.int32).expand(log_t.shape)
    same(solve(problem, name, teacher=TeacherTopK(ids, log_t, tail)), solve(problem, name))
