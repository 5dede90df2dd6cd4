"""metrics.jsonl in the save folder: one object a step, and one an evaluation."""

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_tsft.atomic import write_text
from megatron_tsft.errors import UserError
from megatron_tsft.model.loss_reduction import PER_DATASET
from megatron_tsft.plain_json import parse
from megatron_tsft.plan.plan import Plan
from megatron_tsft.typed import shown

FILE = "metrics.jsonl"
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


def extra_columns(plan: Plan) -> list[str]:
    """Metrics that only some runs have: token weights, scheduled parameters, values of each data
    set of a mixture."""
    names = ["weight"] if plan.packs.weighted else []
    names += plan.objectives.scheduled
    if len(plan.objectives.names) > 1:
        keys = (*PER_DATASET, "tokens")
        names += [f"{key}/{name}" for name in plan.objectives.names for key in keys]
    return names


class MetricsFile:
    """Appends rows; its first row drops those that a resumed run computes again."""

    def __init__(self, path: Path | None):
        """`path`: None where nothing is kept."""
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
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        return True

    def _drop_after(self, step: int, heldout: bool) -> None:
        """Keep what came before this row; also drops the half line of a process that was killed."""
        self._opened = True
        if self.path is None:
            return
        if not self.path.is_file():
            if os.path.lexists(self.path):
                raise UserError(f"{self.path} is no file: move it away")
            self.path.parent.mkdir(parents=True, exist_ok=True)
            return
        lines = [
            line
            for line, row in read_rows(self.path)
            if row["step"] < step
            or (row["step"] == step and heldout and row.get("split") != "heldout")
        ]
        write_text(self.path, "".join(line + "\n" for line in lines))


def read_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(line, row) of a file; the half line of a process that was killed is passed over.

    Raises:
        UserError: a line is none that was written, or no later step than the one before.
    """
    *whole, half = path.read_bytes().split(b"\n")
    whole += [half] if half and _row_of(half) is not None else []
    last = (-1, False)
    for number, line in enumerate(whole, 1):
        row = _row_of(line)
        place = None if row is None else (row["step"], row.get("split") == "heldout")
        if row is None or place is None or place <= last:
            error = UserError(
                f"{path}, line {number} is {shown(line.decode(errors='replace'))}, no object whose"
                " `step` follows the step before: mend the line or move the file away"
            )
            error.met_here_alone = True  # of the ranks
            raise error
        last = place
        yield line.decode(), row


def _row_of(line: bytes) -> dict[str, Any] | None:
    try:
        row = parse(line)
        return row if isinstance(row, dict) and type(row.get("step")) is int else None
    except ValueError:
        return None


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
