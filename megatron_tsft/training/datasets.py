"""Megatron's datasets provider: packs to train on, and held-out packs that each evaluation reads
exactly once."""

from typing import Any

from megatron.core import mpu
from megatron.core.datasets.utils import Split

from megatron_tsft.plan.packs import Packs


class Datasets:
    """The packs of a run as Megatron asks for them."""

    # every rank reads its own packs: Megatron builds loaders on tensor-parallel rank 0 only else
    is_distributed = True

    def __init__(self, packs: Packs):
        self.packs = packs

    def __call__(self, num_samples: Any, vp_stage: int | None = None) -> tuple[Any, Any, None]:
        """(train, validation, no test): what Megatron calls; both are endless, so `num_samples`
        does not matter.

        Only the stage that computes the loss reads the teacher's records.
        """
        last = mpu.is_pipeline_last_stage(ignore_virtual=vp_stage is None, vp_stage=vp_stage)
        train = self.packs.training(with_teacher=last, split=Split.train)
        return train, self.packs.held_out(with_teacher=last, split=Split.valid), None
