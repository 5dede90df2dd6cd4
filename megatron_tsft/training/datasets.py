"""Megatron's datasets provider: packs to train on, and held-out packs that each evaluation reads exactly once."""

import functools
from typing import Any

from megatron.core.datasets.utils import Split

from megatron_tsft.data.packed_dataset import PackedDataset
from megatron_tsft.data.prepared import PreparedData


class Datasets:
    """Both data sets of a run, planned once and shared by every virtual pipeline stage."""

    is_distributed = True  # every rank reads its own packs: Megatron builds loaders on tensor-parallel rank 0 only else

    def __init__(
        self,
        train: PreparedData,
        evaluation: PreparedData | None,
        *,
        seq_length: int,
        global_batch_size: int,
        eval_global_batch_size: int,
        seed: int,
        truncate: bool,
    ):
        """Raises UserError where a conversation is longer than a pack and `truncate` is False."""
        pack = functools.partial(PackedDataset, seq_length=seq_length, seed=seed, truncate=truncate)
        self.train = pack(train, global_batch_size=global_batch_size, split=Split.train)
        self.evaluation: PackedDataset | None = None
        self.eval_iters = 0
        if evaluation is not None:
            self.evaluation = pack(
                evaluation, global_batch_size=eval_global_batch_size, shuffle=False, split=Split.valid
            )
            self.eval_iters = self.evaluation.packs_per_epoch // eval_global_batch_size

    def __call__(self, num_samples: Any, vp_stage: int | None = None) -> tuple[Any, Any, None]:
        """(train, validation, no test): what Megatron calls; both are endless, so `num_samples` does not matter."""
        return self.train, self.evaluation, None
