"""Which objective a token follows: its data set's, with scheduled parameters at the step's
values."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_tsft import objectives
from megatron_tsft.data.batch import MicroBatch
from megatron_tsft.data.prepared import PreparedData
from megatron_tsft.errors import UserError
from megatron_tsft.loss import TeacherTopK, q_target_cross_entropy
from megatron_tsft.objectives import Objective, SingleObjective
from megatron_tsft.plan.config import TsftConfig
from megatron_tsft.plan.sources import Source

LAST_STEP = 1 << 40  # beyond the end of any schedule


@dataclass(frozen=True)
class RunObjectives:
    """The objectives of a run.

    names: of the data sets, for metrics. members: the objective of each. evaluation: of the
    held-out data.
    """

    names: Sequence[str]
    members: Sequence[SingleObjective]
    evaluation: SingleObjective

    def to(self, device: torch.device | str) -> "RunObjectives":
        """The same with their tensors on a device."""
        members = [member.to(device) for member in self.members]
        return RunObjectives(self.names, members, self.evaluation.to(device))

    @property
    def all(self) -> list[SingleObjective]:
        return [*self.members, self.evaluation]

    @property
    def scheduled(self) -> dict[str, Tensor]:
        """Scheduled parameters by the name to log: `eta`, in a mixture `eta/<data set>`."""
        one = len(self.members) == 1
        return {
            key if one else f"{key}/{name}": member.parameters[key]
            for name, member in zip(self.names, self.members, strict=True)
            for key in member.schedules
        }

    def set_step(self, step: int) -> None:
        """Give scheduled parameters their values of a 0-based training step."""
        for objective in self.all:
            objective.set_step(step)

    def of_batch(self, batch: MicroBatch) -> Objective:
        """For labels [s, b]: one objective, or a mixture by each token's data set."""
        if batch.dataset_ids is None or len(self.members) == 1:
            return self.members[0]
        return objectives.Mixture(self.members, batch.dataset_ids.transpose(0, 1))


def load_plugins(files: Sequence[str]) -> None:
    """Run a user's Python files that register objectives.

    Raises:
        UserError: one of them fails, or registers nothing.
    """
    try:
        for file in files:
            objectives.load_plugin(file)
    except (Exception, SystemExit) as error:  # a user's own code may raise anything
        raise UserError(
            f"--tsft-plugin {' '.join(files)}: {type(error).__name__}: {error}"
        ) from error


def parse_objectives(
    config: TsftConfig, sources: Sequence[Source], *, named: bool, evaluates: bool
) -> RunObjectives:
    """The objectives that the flags ask for.

    Args:
        config: objective and args.
        sources: the data sets to train on.
        named: --tsft-objective or --tsft-args is on the command line.
        evaluates: there is held-out data. It has --tsft-objective, or the first data set's where
            all have one.

    Raises:
        UserError: an unknown name or parameter, or an objective that nothing follows.
    """
    ours = ",".join([config.objective, *config.args])
    members = [
        _objective(f"--tsft-data {source.directory}", source.objective)
        if source.objective
        else _objective("--tsft-objective, --tsft-args", ours)
        for source in sources
    ]
    all_have_one = all(source.objective for source in sources)
    if all_have_one and named and not evaluates:
        raise UserError(
            "every --tsft-data has its own objective: leave --tsft-objective and --tsft-args out"
        )
    text = sources[0].objective if all_have_one and not named else ours
    evaluation = _objective("--tsft-objective", text)
    return RunObjectives([source.name for source in sources], members, evaluation)


def _objective(flag: str, text: str) -> SingleObjective:
    try:
        return objectives.parse(text)
    except (ValueError, TypeError) as error:
        raise UserError(f"{flag}: {error}") from error


@dataclass(frozen=True)
class Trial:
    """What an objective is tried with: whether there is a teacher, and whether it is known by its
    most likely tokens alone."""

    teacher: bool
    top_k: bool


def check_objectives(
    run: RunObjectives,
    trial: Trial,
    train: Sequence[PreparedData],
    evaluation: PreparedData | None,
) -> None:
    """Try each objective on one token, so that every rule is the loss's own.

    Raises:
        UserError: weights that the data lacks, or a teacher that is missing or useless.
    """
    if trial.teacher and not any(member.reads_teacher for member in run.members):
        names = ", ".join(sorted({member.name for member in run.members}))
        raise UserError(
            f"objective {names} ignores the teacher that was given: pass --tsft-teacher none"
        )
    for objective, data in zip(run.members, train, strict=True):
        _try(objective, trial, data, may_ignore=len(run.members) > 1)
    if evaluation is not None:
        _try(run.evaluation, trial, evaluation, may_ignore=True)


def _try(objective: SingleObjective, trial: Trial, data: PreparedData, *, may_ignore: bool) -> None:
    """Raise UserError where the loss refuses this objective with the run's teacher and this data's
    weights.

    may_ignore: the teacher is there for another data set's objective, so this one need not read it.
    """
    if data.card.negative_weights:
        raise UserError(
            f"{data.directory} has negative token weights, which '{objective.name}' does not take:"
            " prepare the data with weights of at least 0"
        )
    one, weighted = torch.zeros(1, dtype=torch.int64), data.card.weighted
    teacher = torch.zeros(1, 2)
    if trial.top_k:
        teacher = TeacherTopK(one[:, None], torch.zeros(1, 1), label_logprobs=torch.zeros(1))
    reads = trial.teacher and (objective.reads_teacher or not may_ignore)
    try:
        for step in (0, LAST_STEP):  # a schedule may begin or end where no teacher is needed
            q_target_cross_entropy(
                torch.zeros(1, 2),
                one,
                objective.at_step(step),
                teacher=teacher if reads else None,
                token_weights=torch.ones(1) if weighted else None,
                sequence_ids=one,
                num_sequences=1,
            )
    except (ValueError, TypeError) as error:
        fix = "pass --tsft-teacher none"
        if not trial.teacher:
            fix = "--tsft-teacher reference gives it one"
        if objective.requires_token_weights and not weighted:
            fix = (
                f"{data.directory}: give the JSONL rows `critical` spans or a `weight` and prepare"
                " them again"
            )
        raise UserError(f"{error} ({fix})") from error
