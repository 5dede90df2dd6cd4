"""Takes what Megatron writes to TensorBoard into metrics.jsonl, on the way to the real writer."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron.training import get_timers, global_vars

from megatron_tsft import console
from megatron_tsft.model.metrics_file import (
    COLUMNS,
    FILE,
    MetricsFile,
    extra_columns,
    line,
    number,
)
from megatron_tsft.plan.plan import Plan

# Megatron's names -> ours
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


def install_metrics(
    args: argparse.Namespace, plan: Plan, learning_rate: Callable[[], float | None]
) -> None:
    """Put our writer where Megatron looks for TensorBoard's; on the last rank.

    learning_rate: of the step that is written.
    """
    interval, args.tensorboard_log_interval = args.tensorboard_log_interval, 1
    held = plan.packs.evaluation
    global_vars._GLOBAL_TENSORBOARD_WRITER = MetricsWriter(
        MetricsFile(Path(args.save) / FILE if args.save else None),
        global_vars._GLOBAL_TENSORBOARD_WRITER,
        active_seconds=active_seconds,
        learning_rate=learning_rate,
        interval=interval,
        print_interval=args.log_interval,
        eval_tokens=0 if held is None else int(held.supervised.sum()),
        extra=extra_columns(plan),
    )


def active_seconds() -> float:
    """Seconds of training so far by Megatron's own timer, which stops for evaluations and saves."""
    timers: Any = get_timers()
    timer = timers("interval-time")
    timer.elapsed(reset=False)  # brings the running interval into the sum
    return timer.active_time()


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
        learning_rate: Callable[[], float | None] = lambda: None,
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
            learning_rate: that the step was made with, which Megatron's next one replaces: it asks
                the scheduler after the step; None where it is not known.
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
        self._learning_rate = learning_rate
        self._row: dict[str, Any] = {}
        self._heldout: dict[str, Any] = {}

    def add_scalar(self, name: str, value: Any, step: int, *args: Any, **kwargs: Any) -> None:
        """One value of one step. The gradient norm completes a row; a step that fp16 skips has
        none."""
        if name == "learning-rate" and (own := self._learning_rate()) is not None:
            value = own
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
                console.say(line(row))

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
            console.say(line(row))
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
