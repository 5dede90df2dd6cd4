"""Schedules: their values, their text, and parameters that follow one, loss and gradient
included."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_tsft import objectives, q_target_cross_entropy
from megatron_tsft.objectives import Objective
from megatron_tsft.schedules import KINDS, SYNTAX, Schedule, parse_schedule

# ---- values


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("linear:0:0.5:4", {0: 0, 1: 0.125, 2: 0.25, 3: 0.375, 4: 0.5, 5: 0.5, 1 << 40: 0.5}),
        ("linear:1:0:10", {0: 1, 1: 0.9, 5: 0.5, 9: 0.1, 10: 0, 11: 0}),
        ("linear:0:1:1", {0: 0, 1: 1, 2: 1}),
        (
            "cosine:0:1:4",
            {
                0: 0,
                1: (1 - math.sqrt(0.5)) / 2,
                2: 0.5,
                3: (1 + math.sqrt(0.5)) / 2,
                4: 1,
                1 << 40: 1,
            },
        ),
        ("cosine:0.5:0.1:2", {0: 0.5, 1: 0.3, 2: 0.1, 3: 0.1}),
        ("constant:0.3", {0: 0.3, 1: 0.3, 1 << 40: 0.3}),
        ("constant:0.1:0.7:3", {0: 0.1, 1: 0.1, 2: 0.1, 3: 0.7, 4: 0.7}),
    ],
)
def test_values(text: str, values: dict[int, float]) -> None:
    schedule = parse_schedule(text)
    for step, value in values.items():
        assert schedule.value(step) == pytest.approx(value, rel=1e-15, abs=1e-15), step
    assert (
        schedule.value(0) == schedule.start and schedule.value(schedule.steps) == schedule.stop
    )  # exactly
    assert schedule.value(-1) == schedule.start  # no step before the first


@settings(max_examples=200)
@given(
    st.sampled_from(list(KINDS)),
    st.floats(0, 1),
    st.floats(0, 1),
    st.integers(1, 10**6),
    st.integers(0, 2 * 10**6),
)
def test_a_schedule_stays_between_its_ends_and_never_turns(
    kind: str, start: float, stop: float, steps: int, step: int
) -> None:
    schedule = Schedule(kind, start, stop, steps)
    here, next_ = schedule.value(step), schedule.value(step + 1)
    low, high = min(start, stop) - 1e-15, max(start, stop) + 1e-15  # the last bit of a sum
    assert low <= here <= high
    assert (next_ - here) * (stop - start) >= -1e-15
    if step >= steps:
        assert here == stop


def test_cosine_is_slow_at_both_ends() -> None:
    cosine, linear = (parse_schedule(f"{kind}:0:1:100") for kind in ("cosine", "linear"))
    assert (
        cosine.value(1) < linear.value(1) / 10
        and 1 - cosine.value(99) < (1 - linear.value(99)) / 10
    )
    assert cosine.value(25) < linear.value(25) and cosine.value(75) > linear.value(75)


# ---- text


@pytest.mark.parametrize(
    "text",
    [
        "linear:0:0.5:1000",
        "cosine:0.5:0:1",
        "constant:0.1:0.7:3",
        "linear:-1.5:2e-05:7",
        "linear:0.25:0.25:2",
    ],
)
def test_text_round_trips(text: str) -> None:
    assert str(parse_schedule(text)) == text


def test_text_of_many_digits_round_trips() -> None:
    schedule = parse_schedule("linear:0.1234567:0.7654321:10")
    assert parse_schedule(str(schedule)) == schedule


def test_a_constant_of_one_number() -> None:
    schedule = parse_schedule("constant:0.25")
    assert (
        schedule == Schedule("constant", 0.25, 0.25, 1)
        and parse_schedule(str(schedule)) == schedule
    )


@pytest.mark.parametrize(
    "text",
    [
        "step:0:1:10",  # no such kind
        "Linear:0:1:10",
        "linear",
        "linear:",
        "linear:0.5",  # only a constant may have one number
        "linear:0:1",
        "linear:0:1:10:20",
        "linear:0:1:0",
        "linear:0:1:-5",
        "linear:0:1:2.5",
        "linear:0:1:1e3",
        "linear:0:high:10",
        "linear::1:10",
        "cosine:0:1:",
        "constant:",
        "constant:0:1",
        "constant:high",
        ":0:1:10",
        "",
    ],
)
def test_a_text_that_is_no_schedule(text: str) -> None:
    with pytest.raises(ValueError) as error:
        parse_schedule(text)
    assert repr(text) in str(error.value) and SYNTAX in str(error.value)
    assert error.value.__suppress_context__  # one error, not the conversion's too


def test_the_syntax_names_every_kind() -> None:
    assert list(KINDS) == ["constant", "linear", "cosine"]
    assert all(kind in SYNTAX for kind in KINDS)


# ---- scheduled parameters


def eta(objective: Objective) -> Tensor:
    value = objective.parameters["eta"]
    assert isinstance(value, Tensor)
    return value


def test_parse_and_get() -> None:
    schedule = Schedule("linear", 0.0, 0.5, 10)
    for objective in (
        objectives.parse("target-sft,eta=linear:0:0.5:10"),
        objectives.get("target-sft", eta=schedule),
    ):
        assert objective.schedules == {"eta": schedule}
        assert eta(objective).dim() == 0 and eta(objective).item() == 0
        assert repr(objective) == "target-sft, eta=linear:0:0.5:10"
    assert objectives.parse_parameters(["eta = cosine:0:1:5", "beta=2"]) == {
        "eta": Schedule("cosine", 0.0, 1.0, 5),
        "beta": 2,
    }
    mixed = objectives.parse("idft,threshold=0.25,weight_min=linear:0.1:0.3:10,temperature=2")
    assert (
        repr(mixed)
        == "idft, threshold=0.25, temperature=2, weight_min=linear:0.1:0.3:10, weight_max=1"
    )
    mixed.set_step(5)
    assert repr(mixed).count("linear:0.1:0.3:10") == 1  # the schedule, not the step's value
    assert objectives.get("target-sft", eta=0.5).schedules == {}
    for text in ("target-sft,eta=linear:0:0.5", "target-sft,eta=:"):
        with pytest.raises(ValueError, match="must be written kind:from:to:steps"):
            objectives.parse(text)


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        (
            "target-sft,eta=linear:-0.1:0.5:10",
            ValueError,
            "target-sft: eta=-0.1 is out of range: .* from 0 to 1",
        ),
        (
            "target-sft,eta=linear:0:1.5:10",
            ValueError,
            "target-sft: eta=1.5 is out of range: .* from 0 to 1",
        ),
        ("target-sft,eta=linear:0:nan:10", ValueError, "eta=nan is out of range"),
        ("target-sft,eta=constant:inf", ValueError, "eta=inf is out of range"),
        ("gem,beta=cosine:0.7:0:10", ValueError, "gem: beta=0 is out of range: it must be above 0"),
        (
            "idft,weight_min=linear:2:0.1:10",
            ValueError,
            "weight_min=2 must not exceed weight_max=1",
        ),
        (
            "idft,weight_min=linear:0.1:2:10",
            ValueError,
            "weight_min=2 must not exceed weight_max=1",
        ),
        (
            "idft,weight_max=linear:1:0:10",
            ValueError,
            "weight_min=0.1 must not exceed weight_max=0",
        ),
        (
            "eaft,top_k=linear:10:20:10",
            TypeError,
            "eaft: top_k decides shapes and cannot be scheduled",
        ),
        ("eaft,top_k=constant:20", TypeError, "eaft: top_k decides shapes and cannot be scheduled"),
        ("sft,eta=linear:0:1:10", ValueError, "objective 'sft' has no parameter 'eta'"),
        ("sftt,eta=linear:0:1:10", ValueError, "unknown objective 'sftt'"),
    ],
)
def test_both_ends_are_checked(text: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        objectives.parse(text)


def test_two_ends_that_cross_only_together() -> None:
    """Both at once: 0.1 and 1 at the start, 1 and 2 at the end."""
    objective = objectives.parse("idft,weight_min=linear:0.1:1:10,weight_max=linear:1:2:10")
    objective.set_step(10)
    assert (
        float(objective.parameters["weight_min"]),
        float(objective.parameters["weight_max"]),
    ) == (1, 2)


def test_set_step_fills_in_place() -> None:
    objective = objectives.parse("target-sft,eta=linear:0:0.5:10")
    tensor, place = eta(objective), eta(objective).data_ptr()
    for step in (0, 3, 10, 11, 2):  # any order: a function of the step alone
        objective.set_step(step)
        assert eta(objective) is tensor and tensor.data_ptr() == place
        assert tensor.item() == objective.schedules["eta"].value(step)
    number = objectives.get("target-sft", eta=0.5)
    number.set_step(7)
    assert number.parameters == {"eta": 0.5}


def test_to_copies() -> None:
    """Also where the device stays the same: two runs in one process do not share what a step
    fills."""
    first = objectives.parse("target-sft,eta=linear:0:0.5:10")
    second = first.to("cpu")
    assert second.schedules == first.schedules and repr(second) == repr(first)
    assert eta(second).data_ptr() != eta(first).data_ptr()
    second.set_step(10)
    assert (eta(first).item(), eta(second).item()) == (0, 0.5)
    first.set_step(2)
    assert (eta(first).item(), eta(second).item()) == (0.1, 0.5)


# ---- the loss


def solve(objective: Objective, **keywords: Any) -> tuple[Tensor, Tensor]:
    """Loss [2, 3] and the gradient of its weighted sum, fp64; one label is ignored."""
    g = torch.Generator().manual_seed(0)
    logits, teacher = (
        2 * torch.randn(2, 3, 11, generator=g, dtype=torch.float64) for _ in range(2)
    )
    labels = torch.randint(0, 11, (2, 3), generator=g)
    labels[1, 2] = -100
    if objective.teacher != "none":
        keywords["teacher"] = teacher
    if "reference_logp_y" in objective.needs:
        keywords["reference_logprobs"] = torch.full(
            (2, 3), -4.0
        )  # ratios from far below 1 to far above
    leaf = logits.requires_grad_()
    out = q_target_cross_entropy(leaf, labels, objective, **keywords)
    (out.loss * torch.rand(2, 3, generator=g, dtype=torch.float64)).sum().backward()
    assert leaf.grad is not None
    return out.loss.detach(), leaf.grad


SCHEDULED = {
    "target-sft": ("eta", "linear:0:0.5:4"),
    "sft-kl": ("kl_weight", "cosine:0:0.3:4"),
    "asft": ("kl_weight", "linear:0.2:0:4"),
    "gem": ("beta", "linear:0.7:2:4"),
    "label-smoothing": ("smoothing", "constant:0:0.2:2"),
    "proximal": ("clip_high", "linear:0:30:4"),
    "kd-hybrid": ("teacher_weight", "cosine:1:0:4"),
    "gift": ("beta", "linear:0:20:4"),
    "beyond-log": ("alpha", "linear:0:1:4"),
}


@pytest.mark.parametrize("name", SCHEDULED)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32-weights"])
def test_every_step_is_the_plain_number(name: str, dtype: torch.dtype) -> None:
    key, text = SCHEDULED[name]
    objective = objectives.parse(f"{name},{key}={text}")
    schedule, seen = parse_schedule(text), []
    keywords = {"token_weights": torch.linspace(0, 2, 6, dtype=dtype).reshape(2, 3)}
    for step in range(6):
        objective.set_step(step)
        loss, gradient = solve(objective, **keywords)
        plain = objectives.get(name, **{key: schedule.value(step)})
        expected_loss, expected_gradient = solve(plain, **keywords)
        torch.testing.assert_close(loss, expected_loss, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-12, atol=1e-13)
        seen.append(gradient)
    assert float((seen[0] - seen[4]).abs().max()) > 1e-3  # the parameter matters
    assert torch.equal(seen[4], seen[5])  # beyond the end it stays


def test_a_schedule_that_starts_without_the_teacher_is_given_one() -> None:
    """At eta 0 the teacher is there and changes nothing; without one, a step that needs it is
    refused."""
    objective = objectives.parse("target-sft,eta=linear:0:0.5:10")
    logits, labels = torch.randn(4, 7, generator=torch.Generator().manual_seed(1)), torch.arange(4)
    teacher = torch.randn(4, 7, generator=torch.Generator().manual_seed(2))
    plain = q_target_cross_entropy(logits, labels, objectives.get("target-sft", eta=0.0))
    torch.testing.assert_close(
        q_target_cross_entropy(logits, labels, objective, teacher=teacher).loss, plain.loss
    )
    torch.testing.assert_close(q_target_cross_entropy(logits, labels, objective).loss, plain.loss)
    objective.set_step(1)
    assert (
        q_target_cross_entropy(logits, labels, objective, teacher=teacher).loss - plain.loss
    ).abs().max() > 1e-4
    with pytest.raises(ValueError, match="target-sft, .* needs a teacher and none was given"):
        q_target_cross_entropy(logits, labels, objective)


def test_an_error_of_the_loss_shows_the_schedule() -> None:
    objective = objectives.parse("target-sft,eta=linear:0:0.5:10")
    objective.set_step(1)
    with pytest.raises(ValueError, match="eta=linear:0:0.5:10 needs a teacher"):
        q_target_cross_entropy(torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64), objective)


def test_members_of_a_mixture_follow_their_own_schedules() -> None:
    members = [
        objectives.parse("target-sft,eta=linear:0:0.5:4"),
        objectives.parse("sft-kl,kl_weight=cosine:0.3:0:2"),
    ]
    index = torch.tensor([[0, 1, 1], [1, 0, 0]])
    for step in range(5):
        for member in members:
            member.set_step(step)
        loss, gradient = solve(objectives.mixture(members, index))
        for i, (name, key) in enumerate((("target-sft", "eta"), ("sft-kl", "kl_weight"))):
            expected = solve(objectives.get(name, **{key: members[i].schedules[key].value(step)}))
            chosen = index == i
            torch.testing.assert_close(loss[chosen], expected[0][chosen], rtol=1e-12, atol=1e-13)
            torch.testing.assert_close(
                gradient[chosen], expected[1][chosen], rtol=1e-12, atol=1e-13
            )
