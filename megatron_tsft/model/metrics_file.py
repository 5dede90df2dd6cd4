"""metrics.jsonl in the save folder: one object a step, and one an evaluation."""

import json
import math
from pathlib import Path
from typing import Any

from megatron_tsft.atomic import write_text
from megatron_tsft.model.loss_reduction import PER_DATASET
from megatron_tsft.plan.plan import Plan

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
        if not self.path.exists():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            return
        earlier_lines = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            same = row["step"] == step and heldout and row.get("split") != "heldout"
            if row["step"] < step or same:
                earlier_lines.append(line)
        write_text(self.path, "".join(line + "\n" for line in earlier_lines))


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
