"""Which objective a token follows: its data set's, with scheduled parameters at the step's
values."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_tsft import objectives
from megatron_tsft.data.batch import MicroBatch
from megatron_tsft.objectives import Objective, SingleObjective


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
        return RunObjectives(
            self.names, [member.to(device) for member in self.members], self.evaluation.to(device)
        )

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
