"""Megatron's datasets provider: packs to train on, and held-out packs that each evaluation reads
exactly once."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

from megatron.core import mpu
from megatron.core.datasets.utils import Split

from megatron_tsft.data.blend import BlendedPacks
from megatron_tsft.data.packed_dataset import PackedDataset
from megatron_tsft.data.prepared import PreparedData
from megatron_tsft.data.teacher_rows import TeacherSource, Untaught
from megatron_tsft.teacher.reader import CachedTeacher, TeacherCache


class Datasets:
    """All data sets of a run, planned once and shared by every virtual pipeline stage."""

    # every rank reads its own packs: Megatron builds loaders on tensor-parallel rank 0 only else
    is_distributed = True

    def __init__(
        self,
        train: Sequence[PreparedData],
        shares: Sequence[float],
        evaluation: PreparedData | None,
        *,
        caches: Sequence[TeacherCache],
        taught: Sequence[bool],
        seq_length: int,
        global_batch_size: int,
        eval_global_batch_size: int,
        seed: int,
        truncate: bool,
        document_multiple: int,
    ):
        """
        Args:
            train: the data sets to train on.
            shares: of the packs, one for each.
            evaluation: the held-out data, or None.
            caches: where the teacher's records come from; empty without a cached teacher.
            taught: whether each data set's objective reads a teacher, the evaluation's last.

        Raises:
            UserError: a conversation is longer than a pack and `truncate` is False, or no cache
                knows it.
        """
        pack = functools.partial(
            PackedDataset,
            seq_length=seq_length,
            seed=seed,
            truncate=truncate,
            document_multiple=document_multiple,
        )
        # an epoch of a mixture's member ends where it likes; a single data set is filled up to
        # whole steps
        per_step = global_batch_size if len(train) == 1 else 1
        self.members = [pack(data, global_batch_size=per_step, split=Split.train) for data in train]
        self.shares = shares
        self.evaluation: PackedDataset | None = None
        self.eval_iters = 0
        if evaluation is not None:
            self.evaluation = pack(
                evaluation,
                global_batch_size=eval_global_batch_size,
                shuffle=False,
                split=Split.valid,
            )
            self.eval_iters = self.evaluation.packs_per_epoch // eval_global_batch_size
        packed = [*self.members, *([] if self.evaluation is None else [self.evaluation])]
        top_k = max((cache.top_k for cache in caches), default=0)
        reads = [*taught[: len(train)], taught[-1]]
        self._teachers: dict[int, TeacherSource] = {
            id(part): CachedTeacher(caches, part.data) if read else Untaught(top_k)
            for part, read in zip(packed, reads, strict=False)
            if caches
        }

    def __call__(self, num_samples: Any, vp_stage: int | None = None) -> tuple[Any, Any, None]:
        """(train, validation, no test): what Megatron calls; both are endless, so `num_samples`
        does not matter.

        Only the stage that computes the loss reads the teacher's records.
        """
        last = mpu.is_pipeline_last_stage(ignore_virtual=vp_stage is None, vp_stage=vp_stage)
        weighted = any(part.data.card.weighted for part in self.members)

        def dressed(part: PackedDataset) -> PackedDataset:
            teacher = self._teachers.get(id(part)) if last else None
            return part.with_teacher(
                teacher, weighted if part is not self.evaluation else part.weighted
            )

        evaluation = None if self.evaluation is None else dressed(self.evaluation)
        return self._train(Split.train, dressed), evaluation, None

    def where(self, index: int) -> str:
        """What the training pack of a running number holds, for messages."""
        return self._train(None, lambda part: part).where(index)

    def supervised_tokens(self, start: int, stop: int) -> int:
        """Supervised tokens of the training packs [start, stop)."""
        packs = self._train(None, lambda part: part)
        return sum(packs.supervised_tokens(index) for index in range(start, stop))

    def _train(
        self, split: Any, dress: Callable[[PackedDataset], PackedDataset]
    ) -> PackedDataset | BlendedPacks:
        members = [dress(part) for part in self.members]
        return members[0] if len(members) == 1 else BlendedPacks(members, self.shares, split)
