"""Which kind of teacher a run has: the one that is named, else the one rule for all objectives."""

import functools
import importlib

from torch import Tensor

from megatron_tsft.errors import UserError
from megatron_tsft.objectives import SingleObjective
from megatron_tsft.objectives.objective import ask_before_statistics
from megatron_tsft.plan.config import TsftConfig, destination, option
from megatron_tsft.plan.flags import Flags
from megatron_tsft.plan.run_objectives import LAST_STEP, RunObjectives
from megatron_tsft.plan.teachers import NAMES
from megatron_tsft.plan.teachers.definition import Kind


@functools.cache
def kinds() -> dict[str, Kind]:
    """Every kind by its name."""
    folder = "megatron_tsft.plan.teachers"
    return {name: importlib.import_module(f"{folder}.{name}").KIND for name in NAMES}


def choose_kind(config: TsftConfig, flags: Flags, run: RunObjectives) -> Kind:
    """The kind that --tsft-teacher names. Where it names none: the kind that a flag belongs to,
    else `reference` where an objective needs a teacher, else `none`.

    Raises:
        UserError: a teacher's flag is missing, belongs to another kind, or cannot work with another
            flag; or an objective learns from its teacher alone, and none is named.
    """
    by_flags = [
        kind
        for kind in kinds().values()
        if any(_set(config, field, flags) for field in kind.fields)
    ]
    name = config.teacher or (by_flags[0].name if by_flags else _default(run))
    kind = kinds()[name]
    if kind.needed and not getattr(config, kind.needed):
        raise UserError(f"--tsft-teacher {name} needs {option(kind.needed)} DIR")
    for other in by_flags:
        for field in other.fields:
            if other is not kind and _set(config, field, flags):
                raise UserError(
                    f"{option(field)} belongs to --tsft-teacher {other.name}, which is {name}:"
                    " leave one out"
                )
    kind.check(config, flags)
    return kind


def _set(config: TsftConfig, field: str, flags: Flags) -> bool:
    return bool(getattr(config, field)) and destination(field) in flags.named


def _default(run: RunObjectives) -> str:
    """The rule where nothing is said."""
    for objective in run.members:
        if _needs_teacher(objective) and _only_teaches(objective):
            raise UserError(
                f"objective {objective.name!r} needs a teacher, learns from it alone, and none is"
                " named: pass --tsft-teacher-load DIR, --tsft-teacher-cache DIR, or --tsft-teacher"
                " reference"
            )
    return "reference" if any(map(_needs_teacher, run.members)) else "none"


def _needs_teacher(objective: SingleObjective) -> bool:
    """Whether some step of the run reads the teacher."""
    if objective.teacher != "optional":
        return objective.reads_teacher
    for step in (0, LAST_STEP):
        share = objective.at_step(step).residual().b
        if bool((share != 0).any()) if isinstance(share, Tensor) else share != 0:
            return True
    return False


def _only_teaches(objective: SingleObjective) -> bool:
    """Whether the label counts for nothing, so that a copy of the student would teach nothing."""
    imitation = ask_before_statistics(objective.row.function, objective.parameters).imitation
    return not isinstance(imitation, Tensor) and imitation == 0
