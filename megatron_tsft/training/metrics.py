"""metrics.jsonl: one object a step, written where Megatron keeps its TensorBoard writer, which it
still feeds."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_tsft.atomic import write_text

FILE = "metrics.jsonl"
TRAIN = {
    "loss": "loss",
    "nll": "nll",
    "gamma": "gamma",
    "entropy": "entropy",
    "kl": "kl",
    "tokens": "tokens",
    "bad_teacher_rows": "bad_teacher_rows",
    "learning-rate": "lr",
    "grad-norm": "grad_norm",
}
HELDOUT = {"loss validation": "loss", "nll validation": "nll"}
COLUMNS = (
    "step",
    "loss",
    "nll",
    "gamma",
    "entropy",
    "kl",
    "tokens",
    "tokens_per_second",
    "lr",
    "grad_norm",
)


class MetricsFile:
    """Appends rows; at the first one of a process, rows that a resumed run computes again are
    dropped."""

    def __init__(self, path: Path):
        self.path = path
        self._opened = False
        self._last_heldout = -1

    def write(self, row: dict[str, Any]) -> bool:
        """Append one row; False for a second evaluation of the same step, which is left out."""
        heldout, step = row.get("split") == "heldout", row["step"]
        if not self._opened:
            self._drop_after(step, heldout)
        if heldout and step == self._last_heldout:
            return False
        if heldout:
            self._last_heldout = step
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        return True

    def _drop_after(self, step: int, heldout: bool) -> None:
        """Keep what came before this row; also drops the half line of a process that was killed."""
        self._opened = True
        if not self.path.exists():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            same = row["step"] == step and heldout and row.get("split") != "heldout"
            if row["step"] < step or same:
                kept.append(line)
        write_text(self.path, "".join(line + "\n" for line in kept))


class MetricsWriter:
    """Stands in for Megatron's TensorBoard writer on the last rank; passes everything on to the
    real one, if any.

    Megatron writes a step's learning rate, then our metrics, then the gradient norm (training.py,
    `training_log`).
    """

    def __init__(
        self,
        file: MetricsFile,
        inner: Any,
        *,
        active_seconds: Callable[[], float],
        interval: int,
        eval_tokens: int,
        print_interval: int = 1,
        extra: Sequence[str] = (),
    ):
        """
        Args:
            file: where rows go.
            inner: the real TensorBoard writer, or None.
            active_seconds: seconds of training so far, evaluations and saves left out.
            interval: steps between TensorBoard's values; the file gets every step.
            eval_tokens: supervised tokens of an evaluation.
            print_interval: steps between the lines on the console.
            extra: metrics of this run only (scheduled parameters, values per data set), as Megatron
                names them.
        """
        self.file, self.inner, self.interval, self.eval_tokens = file, inner, interval, eval_tokens
        self.print_interval, self.extra = print_interval, tuple(extra)
        self._names = TRAIN | {name: name for name in extra}
        self._active_seconds, self._seconds = active_seconds, 0.0
        self._row: dict[str, Any] = {}
        self._heldout: dict[str, Any] = {}

    def add_scalar(self, name: str, value: Any, step: int, *args: Any, **kwargs: Any) -> None:
        """One value of one step. The gradient norm completes a row; a step that fp16 skips has
        none."""
        if self._row and (name in HELDOUT or name in self._names and step != self._row["step"]):
            self._finish_step()
        if name in self._names:
            self._row |= {"step": step, self._names[name]: number(value)}
            if name == "tokens":
                self._time_step()
        elif name in HELDOUT:
            self._heldout[HELDOUT[name]] = number(value)
        if self.inner is not None and (step % self.interval == 0 or "validation" in name):
            self.inner.add_scalar(name, value, step, *args, **kwargs)
        if name == "grad-norm":
            self._finish_step()
        if name in HELDOUT and len(self._heldout) == len(HELDOUT):
            row = {"split": "heldout", "step": step, **self._heldout, "tokens": self.eval_tokens}
            self._heldout = {}
            if self.file.write(row):
                print(line(row), flush=True)

    def _time_step(self) -> None:
        seconds = self._active_seconds()
        rate = self._row["tokens"] / max(seconds - self._seconds, 1e-9)
        self._seconds = seconds
        self._row |= {"tokens": round(self._row["tokens"]), "tokens_per_second": round(rate, 3)}

    def _finish_step(self) -> None:
        step, found, self._row = self._row["step"], self._row, {}
        row = {column: found.get(column) for column in (*COLUMNS, *self.extra)}
        row |= {
            name: round(found[name])
            for name in self.extra
            if name.startswith("tokens/") and found.get(name)
        }
        if found.get(
            "bad_teacher_rows"
        ):  # tokens that were left out, because the teacher had no finite row for them
            row["bad_teacher_rows"] = round(found["bad_teacher_rows"])
        self.file.write(row)
        if step % self.print_interval == 0:
            print(line(row), flush=True)
        if self.inner is not None and step % self.interval == 0:
            self.inner.add_scalar("tokens-per-second", row["tokens_per_second"], step)

    def flush(self) -> None:
        """Megatron calls this when training is over: a row that still waits is complete."""
        if self._row:
            self._finish_step()
        if self.inner is not None:
            self.inner.flush()

    def __getattr__(self, name: str) -> Any:
        """add_text, add_histogram and the rest: the real writer's, or nothing."""
        return getattr(self.inner, name) if self.inner is not None else lambda *args, **kwargs: None


def line(row: dict[str, Any]) -> str:
    """A row for the console: Megatron's own line leaves negative values and the speed out."""
    values = (
        f"{name} {value:.5g}"
        for name, value in row.items()
        if name not in ("split", "step") and value is not None
    )
    return " | ".join([f"{row.get('split', 'step')} {row['step']}", *values])


def number(value: Any) -> float | None:
    """A float, or None where there is none (JSON has no NaN)."""
    value = float(value)
    return value if math.isfinite(value) else None
