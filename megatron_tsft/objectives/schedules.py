"""A parameter that moves with the training step: `eta=linear:0:0.5:1000`."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

KINDS: Mapping[
    str, Callable[[float], float]
] = {  # share of the way from start to stop after a share of the steps
    "constant": lambda share: float(share >= 1),
    "linear": lambda share: share,
    "cosine": lambda share: (1 - math.cos(math.pi * share)) / 2,
}
SYNTAX = (
    f"kind:from:to:steps with kind one of {', '.join(KINDS)}, such as linear:0:0.5:1000, or"
    " constant:VALUE"
)


@dataclass(frozen=True)
class Schedule:
    """From `start` at step 0 to `stop` at step `steps`, which it keeps; constant jumps there.

    A function of the step alone, so a resumed run has the values that it would have had.
    """

    kind: str
    start: float
    stop: float
    steps: int

    def __str__(self) -> str:
        start, stop = (
            f"{x:g}" if float(f"{x:g}") == x else repr(x) for x in (self.start, self.stop)
        )
        return f"{self.kind}:{start}:{stop}:{self.steps}"

    def value(self, step: int) -> float:
        """The value of 0-based training step `step`."""
        share = KINDS[self.kind](min(max(step / self.steps, 0.0), 1.0))
        return self.stop if share == 1 else self.start + share * (self.stop - self.start)


def parse_schedule(text: str) -> Schedule:
    """A Schedule from "linear:0:0.5:1000".

    Raises:
        ValueError: another kind, not four parts, numbers that are none, or fewer than 1 step.
    """
    kind, *numbers = text.split(":")
    if kind == "constant" and len(numbers) == 1:
        numbers = [numbers[0], numbers[0], "1"]
    try:
        start, stop, steps = float(numbers[0]), float(numbers[1]), int(numbers[2])
        if kind not in KINDS or len(numbers) != 3 or steps < 1:
            raise ValueError
    except (ValueError, IndexError):
        raise ValueError(f"schedule {text!r} must be written {SYNTAX}") from None
    return Schedule(kind, start, stop, steps)
