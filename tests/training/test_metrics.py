"""metrics.jsonl: what Megatron's writer is told becomes rows; a resumed run leaves no step twice
and no half line."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from megatron_tsft.errors import UserError
from megatron_tsft.model.metrics_file import COLUMNS, MetricsFile
from megatron_tsft.training.metrics import MetricsWriter
from tests.training.runs import REPOSITORY, Train, World, check_ran


class Inner:
    """Records what reaches TensorBoard."""

    def __init__(self) -> None:
        self.scalars: list[tuple[str, int]] = []

    def add_scalar(self, name: str, value: Any, step: int) -> None:
        self.scalars.append((name, step))

    def flush(self) -> None: ...


def writer(path: Path, inner: Any = None, interval: int = 1) -> MetricsWriter:
    seconds = iter([2.0, 6.0, 8.0, 10.0])
    return MetricsWriter(
        MetricsFile(path),
        inner,
        active_seconds=lambda: next(seconds),
        interval=interval,
        eval_tokens=50,
    )


def step(to: MetricsWriter, number: int, loss: float = 1.0) -> None:
    """What training_log of Megatron writes for one step, in its order."""
    to.add_scalar("learning-rate", 0.1, number)
    to.add_scalar("batch-size", 4, number)
    for name, value in {
        "loss": loss,
        "nll": 2.0,
        "gamma": 0.5,
        "entropy": 3.0,
        "kl": math.nan,
        "tokens": 8.0,
    }.items():
        to.add_scalar(name, value, number)
        to.add_scalar(f"{name} vs samples", value, 4 * number)
    to.add_scalar("grad-norm", 0.25, number)


def evaluation(to: MetricsWriter, number: int) -> None:
    to.add_scalar("loss validation", 1.5, number)
    to.add_scalar("loss validation vs samples", 1.5, 4 * number)
    to.add_scalar("nll validation", 2.5, number)


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_step_is_one_row_at_once(tmp_path: Path) -> None:
    path = tmp_path / "new" / "metrics.jsonl"
    to = writer(path)
    step(to, 1)
    assert list(rows(path)[0]) == list(COLUMNS)
    expected = {
        "step": 1,
        "loss": 1.0,
        "kl": None,
        "tokens": 8,
        "tokens_per_second": 4.0,
        "lr": 0.1,
        "grad_norm": 0.25,
    }
    assert rows(path)[0].items() >= expected.items()
    step(to, 2)
    assert rows(path)[1]["tokens_per_second"] == 2.0  # 8 tokens in 4 seconds


def test_a_step_without_a_gradient_norm_waits_for_the_next(tmp_path: Path) -> None:
    """fp16 skips steps whose gradient overflows: Megatron then writes no norm."""
    path = tmp_path / "metrics.jsonl"
    to = writer(path)
    for name, value in {
        "learning-rate": 0.1,
        "loss": 1.0,
        "nll": 2.0,
        "tokens": 8.0,
        "bad_teacher_rows": 3.0,
    }.items():
        to.add_scalar(name, value, 1)
    assert not path.exists()
    step(to, 2)
    assert [row["step"] for row in rows(path)] == [1, 2]
    assert rows(path)[0]["grad_norm"] is None and rows(path)[0]["tokens_per_second"] == 4.0
    assert rows(path)[0]["bad_teacher_rows"] == 3 and "bad_teacher_rows" not in rows(path)[1]
    to.add_scalar("loss", 1.0, 3)
    to.add_scalar("tokens", 8.0, 3)
    to.flush()  # training is over
    assert rows(path)[-1]["step"] == 3


def test_the_console_shows_what_megatron_leaves_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    step(writer(tmp_path / "metrics.jsonl"), 1, loss=-1.25)
    shown = (
        "step 1 | loss -1.25 | nll 2 | gamma 0.5 | entropy 3 | tokens 8 | tokens_per_second 4 | lr"
        " 0.1 | grad_norm 0.25"
    )
    assert capsys.readouterr().out == shown + "\n"


def test_an_evaluation_is_one_row_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    to = writer(path)
    step(to, 1)
    evaluation(to, 1)
    evaluation(to, 1)  # Megatron evaluates once more when training is over
    assert rows(path)[1:] == [
        {"split": "heldout", "step": 1, "loss": 1.5, "nll": 2.5, "tokens": 50}
    ]


def test_a_resumed_run_replaces_what_it_computes_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = writer(path)
    for number in (1, 2, 3):
        step(first, number)
        evaluation(first, number)
    with path.open("a") as file:
        file.write('{"step": 4, "lo')
    step(writer(path), 3, loss=7.0)
    assert [(row["step"], row.get("split")) for row in rows(path)] == [
        (1, None),
        (1, "heldout"),
        (2, None),
        (2, "heldout"),
        (3, None),
    ]
    assert rows(path)[-1]["loss"] == 7.0


@pytest.mark.parametrize(
    "line",
    [
        b"\xff\xfe",
        b"[1]",
        b"5",
        b'{"loss": 1}',
        b'{"step": "2"}',
        b'{"step": 1}',
        b"{",
        b"[" * 10**5,
    ]
    + [b'{"step": 2, "loss": NaN}'],
)
def test_a_damaged_line_is_named_and_nothing_is_lost(line: bytes, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 3}\n')
    before = path.read_bytes()
    with pytest.raises(UserError, match=f"{path}, line 2 is .*: mend the line or move the file"):
        step(writer(path), 3)
    assert path.read_bytes() == before
    path.unlink()
    path.mkdir()
    with pytest.raises(UserError, match="metrics.jsonl is no file: move it away"):
        step(writer(path), 3)


def test_evaluating_alone_keeps_the_training_row(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = writer(path)
    step(first, 1)
    evaluation(first, 1)
    evaluation(writer(path), 1)
    assert [(row["step"], row.get("split")) for row in rows(path)] == [(1, None), (1, "heldout")]


def test_tensorboard_gets_its_own_interval(tmp_path: Path) -> None:
    inner = Inner()
    to = writer(tmp_path / "metrics.jsonl", inner, interval=2)
    for number in (1, 2):
        step(to, number)
    evaluation(to, 1)
    assert ("nll", 2) in inner.scalars and ("nll", 1) not in inner.scalars
    assert ("tokens-per-second", 2) in inner.scalars and ("nll validation", 1) in inner.scalars
    assert len(rows(tmp_path / "metrics.jsonl")) == 3


@pytest.mark.slow
def test_a_run_with_a_plugin_reaches_tensorboard(
    train: Train, world: World, tmp_path: Path
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    plugin = str(REPOSITORY / "examples" / "plugins" / "power_target.py")
    flags = [
        "--tsft-plugin",
        plugin,
        "--tsft-objective",
        "power-target",
        "--tsft-args",
        "alpha=0.5",
        "eta=0.3",
    ]
    flags += ["--tsft-teacher", "reference", "--tensorboard-dir", str(tmp_path / "board")]
    run = check_ran(train("plugin", *flags, steps=2))
    assert "power-target, alpha=0.5, eta=0.3" in run.logs[0]
    events = EventAccumulator(str(tmp_path / "board")).Reload()
    for name in ("loss", "nll", "gamma", "entropy", "kl", "tokens", "tokens-per-second"):
        assert [event.step for event in events.Scalars(name)] == [1, 2], name
    assert events.Scalars("gamma")[0].value == pytest.approx(run.rows[0]["gamma"])
    other = check_ran(train("dft", "--tsft-objective", "dft", steps=1))
    assert (
        run.rows[0]["gamma"] > 1.5 * other.rows[0]["gamma"]
    )  # p^0.5 trusts unlikely labels more than p
    assert run.rows[0]["nll"] == pytest.approx(other.rows[0]["nll"])
