"""Numbers that are not finite stop a run before it saves them, and steps that train nothing are
said."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_tsft.data.prepare import prepare
from megatron_tsft.errors import UserError
from megatron_tsft.training.stop_signals import StopSignals
from megatron_tsft.training.watch import Watch, first_not_finite
from tests.training.runs import Train, World, check_ran, write_rows

SFT = ("--tsft-objective", "sft")


def heavy(folder: Path, world: World, weight: float) -> tuple[str, str]:
    """--tsft-data of rows with this weight."""
    rows = write_rows(folder / "heavy.jsonl", 40, 2, weight=weight)
    prepare(rows, world.hf, folder / "heavy", progress=False)
    return "--tsft-data", str(folder / "heavy")


def saved(save: Path) -> list[str]:
    return sorted(path.name for path in save.glob("iter_*"))


# plain descent with a rate of 3e38 at its second step, where weights overflow
OVERFLOW = ("--optimizer", "sgd", "--sgd-momentum", "0", "--clip-grad", "0")
OVERFLOW += ("--lr", "3e38", "--lr-warmup-iters", "1", "--lr-decay-iters", "8")


@pytest.mark.parametrize("ranks", [1, 2])
def test_weights_that_are_not_finite_are_not_saved(
    train: Train, tmp_path: Path, world: World, ranks: int
) -> None:
    """And each start goes on from the last good checkpoint."""
    words = (*SFT, *OVERFLOW, *heavy(tmp_path, world, 100.0), "--save-interval", "1")
    words += ("--pipeline-model-parallel-size", str(ranks))
    save = tmp_path / "run"
    for start in range(2):
        run = train(save, *words, ranks=ranks, steps=4, keep=True)
        assert run.codes[0] == 2 and saved(save) == ["iter_0000001"], run.logs[0][-3000:]
        assert re.search("^error: step 2, rank [01]: parameter .* not finite", run.error)
        assert "the same command goes on from the last checkpoint" in run.error
        assert (f"{save}, 1 steps" in run.logs[0]) == bool(start)


def test_a_gradient_that_is_not_finite_names_step_rank_and_conversations(
    train: Train, tmp_path: Path
) -> None:
    run = train(tmp_path / "run", *SFT, *OVERFLOW, "--save-interval", "5", steps=6, keep=True)
    assert run.codes == [2] and saved(run.save) == []
    assert "error: step 3, rank 0: the gradient of its micro-batches is nan (pack " in run.error
    assert "sample_ids" in run.error and "--ckpt-step" in run.error


def test_a_loss_that_is_not_finite_names_step_rank_and_conversations(
    train: Train, tmp_path: Path, world: World
) -> None:
    run = train(tmp_path / "run", *SFT, *heavy(tmp_path, world, 3e38), steps=3)
    assert run.codes == [2] and saved(run.save) == []
    assert "error: step 1, rank 0: the loss of a micro-batch is inf (pack " in run.error


def test_kd_with_the_reference_trains_nothing_and_says_so(train: Train, tmp_path: Path) -> None:
    words = ("--tsft-objective", "kd", "--tsft-teacher", "reference", "--weight-decay", "0")
    run = train(tmp_path / "run", *words, steps=3)
    assert "WARNING: step 1 has a gradient of zero" in run.logs[0], run.logs[0][-3000:]
    assert run.codes == [2] and "nothing was trained: each of 3 steps" in run.error


def test_steps_that_fp16_skips_are_said(train: Train, tmp_path: Path) -> None:
    words = (*SFT, "--fp16", "--initial-loss-scale", "4294967296")
    run = train(tmp_path / "run", *words, steps=2)
    assert "WARNING: step 1 was skipped" in run.logs[0], run.logs[0][-3000:]
    assert run.codes == [2] and "nothing was trained: each of 2 steps" in run.error
    check_ran(train(tmp_path / "usual", *SFT, "--fp16", steps=8))


def test_the_logged_rate_is_the_steps_own(train: Train, tmp_path: Path) -> None:
    words = (*SFT, "--lr", "8e-3", "--lr-warmup-iters", "4", "--lr-decay-iters", "8")
    run = check_ran(train(tmp_path / "run", *words, steps=3))
    assert [row["lr"] for row in run.rows] == pytest.approx([0, 2e-3, 4e-3])


def watch_of(spike: float = 0.0) -> Watch:
    return Watch(lambda: ["pack 7 of data"], StopSignals(), objective="sft", spike=spike)


def test_a_spike_stops_the_run_where_it_is_asked_for() -> None:
    def steps(watch: Watch, *values: float) -> None:
        for step, nll in enumerate(values, 1):
            watch.before(step, 1e-3)
            watch.after({"nll": torch.tensor(nll)}, False, 1.0)
            assert not watch.stop_asked("cpu")

    usual = [1.0 + 0.01 * i for i in range(30)]
    steps(watch_of(), *usual, 30.0)
    steps(watch_of(2.0), *usual, 2.3)
    steps(watch_of(2.0), *usual[:10], 30.0)  # too early to say what is usual
    with pytest.raises(UserError, match="step 31: the negative log-likelihood is 2.5, more than 2"):
        steps(watch_of(2.0), *usual, 2.5)


@pytest.mark.parametrize("norm", [float("nan"), float("inf")])
def test_a_gradient_norm_that_is_not_finite(norm: float) -> None:
    watch = watch_of()
    watch.before(3, 1e-3)
    watch.after({}, False, norm)
    with pytest.raises(UserError, match="step 3: the gradient norm of all ranks is"):
        watch.stop_asked("cpu")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", ["parameter 0.bias", "exp_avg of", "the main weight of"])
def test_where_a_number_is_not_finite(place: str, value: float) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)).bfloat16()
    mains = [p.detach().float().requires_grad_() for p in model.parameters()]
    inner: Any = torch.optim.AdamW(mains)
    for p in mains:
        p.grad = torch.ones_like(p)
    inner.step()
    optimizer: Any = SimpleNamespace(chained_optimizers=[SimpleNamespace(optimizer=inner)])
    assert first_not_finite([model], optimizer) == ""
    with torch.no_grad():
        if place.startswith("parameter"):
            model[0].bias[1] = value  # pyright: ignore[reportIndexIssue]
        elif place.startswith("exp"):
            inner.state[mains[2]]["exp_avg"][1, 0] = value
        else:
            mains[3][0] = value
    assert first_not_finite([model], optimizer).startswith(place)
    assert first_not_finite([model], SimpleNamespace(optimizer=inner)).startswith(place)
