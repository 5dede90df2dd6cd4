"""A reference that takes the student's weights every N steps: the ratio there is exactly 1, in a
resumed run too."""

from collections.abc import Sequence
from typing import Any

import pytest

from tests.training.runs import Run, Train, World, check_ran

MOVING = (
    *"--tsft-objective proximal --tsft-teacher reference".split(),
    "--tsft-reference-refresh",
    "2",
)


def without_clock(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in row.items() if key != "tokens_per_second"} for row in rows
    ]


def assert_refreshed(run: Run, every: int) -> None:
    """gamma is the mean of ratios p / p_ref: exactly 1 where both are the same numbers, and nowhere
    else."""
    for row in run.rows:
        assert (row["gamma"] == 1.0) == ((row["step"] - 1) % every == 0), (
            row["step"],
            row["gamma"],
        )


@pytest.mark.slow
def test_the_ratio_is_one_at_every_refresh_in_every_layout(train: Train) -> None:
    alone = check_ran(train("alone", *MOVING, steps=6))
    assert len(alone.rows) == 6
    assert_refreshed(alone, 2)
    layouts = {
        "pp2": (2, "--pipeline-model-parallel-size 2"),
        "tp2": (2, "--tensor-model-parallel-size 2"),
        "vpp2": (2, "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1"),
        "dp2-distributed-optimizer": (2, "--use-distributed-optimizer"),
        "fused": (1, "--tsft-fuse-head"),
    }
    for name, (ranks, flags) in layouts.items():
        run = check_ran(train(name, *MOVING, *flags.split(), ranks=ranks, steps=6))
        assert_refreshed(run, 2)
        for ours, theirs in zip(run.rows, alone.rows, strict=True):
            for key in ("loss", "nll", "gamma", "grad_norm"):
                assert ours[key] == pytest.approx(theirs[key], rel=5e-5), (name, ours["step"], key)

    # how often matters: every step is plain maximum
    # likelihood's gradient, never is another run from step 3 on
    assert_refreshed(check_ran(train("each", *MOVING, "--tsft-reference-refresh", "1")), 1)
    fixed = check_ran(train("fixed", *MOVING, "--tsft-reference-refresh", "0"))
    assert without_clock(fixed.rows[:2]) == without_clock(alone.rows[:2])
    assert fixed.rows[0]["gamma"] == 1 and abs(fixed.rows[2]["gamma"] - 1) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "flags"), [(1, ""), (2, "--pipeline-model-parallel-size 2")], ids=["one-rank", "pp2"]
)
def test_it_resumes_with_the_reference_it_had(train: Train, ranks: int, flags: str) -> None:
    start = (*MOVING, *flags.split())
    straight = check_ran(train("straight", *start, ranks=ranks, steps=6))
    assert_refreshed(straight, 2)
    for stop in (
        2,
        3,
    ):  # where the next step takes the student's weights anyway; one step after a refresh
        name = f"stopped-{stop}"
        first = check_ran(
            train(
                name,
                *start,
                "--save-interval",
                "1",
                "--exit-interval",
                str(stop),
                ranks=ranks,
                steps=6,
                keep=True,
            )
        )
        assert [row["step"] for row in first.rows] == list(range(1, stop + 1))
        resumed = check_ran(train(name, *start, "--save-interval", "1000", ranks=ranks, steps=6))
        assert f"at iteration {stop}" in resumed.logs[0]
        assert without_clock(resumed.rows) == without_clock(straight.rows), stop


@pytest.mark.slow
def test_a_reference_that_is_gone_is_refused(train: Train) -> None:
    """Saved at 3 only: the weights of step 2, which were the reference, are nowhere."""
    gone = ("--save-interval", "4", "--exit-interval", "3")
    check_ran(train("gone", *MOVING, *gone, steps=6, keep=True))
    resumed = train("gone", *MOVING, "--save-interval", "4", steps=6, keep=True)
    assert resumed.codes == [2] and "Traceback" not in resumed.logs[0]
    assert all(part in resumed.error for part in ("step 3", "step 2", "gone", "multiple of 2")), (
        resumed.error
    )


@pytest.mark.slow
def test_a_finished_run_started_again_evaluates_the_same(train: Train, world: World) -> None:
    """A requeued job whose run was over: it writes the last evaluation again, by the reference of
    the last refresh."""
    held = ("--tsft-eval-data", str(world.held), "--eval-interval", "4", "--save-interval", "2")
    once = check_ran(train("over", *MOVING, *held, steps=4, keep=True)).heldout
    assert [row["step"] for row in once] == [4]
    again = check_ran(train("over", *MOVING, *held, steps=4, keep=True)).heldout
    assert again[0]["nll"] == once[0]["nll"]  # the same student
    assert again == once


@pytest.mark.slow
def test_an_earlier_checkpoint_has_its_own_reference(train: Train) -> None:
    """Or is refused."""
    check_ran(train("earlier", *MOVING, "--save-interval", "1", steps=5, keep=True))
    straight = check_ran(train("straight", *MOVING, steps=4))
    again = train("earlier", *MOVING, "--ckpt-step", "3", steps=4)
    if again.codes == [2]:
        assert "--ckpt-step" in again.error
    else:
        assert without_clock(check_ran(again).rows) == without_clock(straight.rows)


REFUSED = {
    "finetune": ("--finetune", ["--tsft-reference-refresh", "--finetune", "--tsft-model"]),
    "gathering while the first layer runs": (
        "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather",
        ["--tsft-reference-refresh", "--overlap-param-gather"],
    ),
    "saves between refreshes": (
        "--save-interval 3",
        ["--save-interval 3", "--tsft-reference-refresh 2", "multiple"],
    ),
    "refreshes between saves": (
        "--tsft-reference-refresh 5 --save-interval 3",
        ["--save-interval 3", "--tsft-reference-refresh 5", "multiple"],
    ),
    "no teacher": (
        "--tsft-objective sft --tsft-teacher none",
        ["--tsft-reference-refresh", "--tsft-teacher reference", "none"],
    ),
    "negative": ("--tsft-reference-refresh -1", ["--tsft-reference-refresh -1", "at least 1"]),
    "no number": ("--tsft-reference-refresh often", ["--tsft-reference-refresh", "'often'"]),
}


@pytest.mark.slow
def test_what_could_not_be_had_again_is_refused(train: Train) -> None:
    for name, (flags, parts) in REFUSED.items():
        run = train(name.replace(" ", "-"), *MOVING, *flags.split())
        assert run.codes == [2], (name, run.logs[0][-2000:])
        assert all(part in run.error for part in parts), (name, run.error)
        assert "Traceback" not in run.logs[0] and not run.save.exists(), name
