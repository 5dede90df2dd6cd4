"""`--tsft-data`: one prepared folder, or several with their shares and objectives
(DIR:0.7:target-sft,eta=0.5)."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_tsft.errors import UserError

SYNTAX = "DIR, DIR:SHARE or DIR:SHARE:OBJECTIVE, such as data/maths:0.7:target-sft,eta=0.5"


@dataclass(frozen=True)
class Source:
    """One data set of a run.

    share: of the packs, positive; shares need not add up to 1. objective: as on the command line,
    "" for `--tsft-objective`. name: for metrics.
    """

    directory: str
    share: float
    objective: str
    name: str


def parse_sources(texts: Sequence[str]) -> list[Source]:
    """The data sets that `--tsft-data` names, in order.

    Raises:
        UserError: a share that is no positive number, or a folder twice.
    """
    parts = []
    for text in texts:
        # a folder whose own name has a colon is taken as it is
        directory, share, objective = (
            (text, "", "") if Path(text).is_dir() else (*text.split(":", 2), "", "")[:3]
        )
        try:
            number = float(share) if share else 1.0
        except ValueError:
            number = math.nan
        if not directory or not (math.isfinite(number) and number > 0):
            raise UserError(
                f"--tsft-data {text}: the share {share!r} is no positive number; write {SYNTAX}"
            )
        parts.append((directory, number, objective))
    folders = Counter(str(Path(directory).resolve()) for directory, _, _ in parts)
    twice = [folder for folder, count in folders.items() if count > 1]
    if twice:
        raise UserError(f"--tsft-data names {twice[0]} twice: give it one share and one objective")
    short = [Path(directory).resolve().name for directory, _, _ in parts]
    names: list[str] = []
    for (directory, _, _), name in zip(parts, short, strict=True):
        candidate = name if short.count(name) == 1 else directory
        names.append(candidate if candidate not in names else f"{candidate}-{len(names) + 1}")
    return [
        Source(directory, share, objective, name)
        for (directory, share, objective), name in zip(parts, names, strict=True)
    ]
