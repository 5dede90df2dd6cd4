"""The packs of a run: every data set's, planned once, with the teacher's records where a teacher
has been asked before."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from megatron_tsft.data.blend import BlendedPacks
from megatron_tsft.data.packed_dataset import PackedDataset
from megatron_tsft.data.prepared import PreparedData
from megatron_tsft.data.teacher_rows import TeacherSource, Untaught
from megatron_tsft.plan.layout import Batch

TrainingPacks = PackedDataset | BlendedPacks


class RecordBook(Protocol):
    """Where the records of a teacher lie that has been asked before."""

    @property
    def top_k(self) -> int:
        """k of every record."""
        ...

    def of(self, data: PreparedData) -> TeacherSource:
        """The records of a prepared data set.

        Raises:
            UserError: some of its conversations have none.
        """
        ...


@dataclass(frozen=True)
class PackRules:
    """What decides the packs and their order, beside the data.

    seq_length: positions of a pack. seed: with the epoch, decides packs and order.
    document_multiple: each conversation is padded to a multiple of it. long_samples: what happens
    to conversations that are longer than a pack (data/pieces.py).
    """

    seq_length: int
    seed: int
    document_multiple: int
    long_samples: str


@dataclass(frozen=True)
class DataSet:
    """A prepared data set of a run; `share` of every step's packs, positive; `taught`: its
    objective reads a teacher."""

    data: PreparedData
    share: float
    taught: bool


@dataclass(frozen=True)
class _Member:
    """The packs of one data set, and the teacher's records for them."""

    packs: PackedDataset
    teacher: TeacherSource | None


class Packs:
    """All packs of a run. The order depends on the seed and the running number alone."""

    def __init__(
        self,
        train: Sequence[DataSet],
        evaluation: DataSet | None,
        rules: PackRules,
        batch: Batch,
        records: RecordBook | None = None,
    ):
        """
        Args:
            train: the data sets to train on.
            evaluation: the held-out data, or None.
            rules: how packs are made.
            batch: packs of a step.
            records: of a teacher that has been asked before, or None.

        Raises:
            UserError: a conversation is longer than a pack and is not to be cut, or a teacher's
                record of it is missing.
        """
        self.rules, self.shares = rules, [member.share for member in train]
        pack = functools.partial(
            PackedDataset,
            seq_length=rules.seq_length,
            seed=rules.seed,
            long_samples=rules.long_samples,
            document_multiple=rules.document_multiple,
        )

        def taught(member: DataSet, packs: PackedDataset) -> _Member:
            if records is None:
                return _Member(packs, None)
            of = records.of(member.data) if member.taught else Untaught(records.top_k)
            return _Member(packs, of)

        # an epoch of a mixture's member ends where it likes;
        # a single data set is filled up to whole steps
        per_step = batch.size if len(train) == 1 else 1
        planned = [pack(member.data, global_batch_size=per_step) for member in train]
        held = None
        if evaluation is not None:
            held = pack(evaluation.data, global_batch_size=batch.evaluation, shuffle=False)
        self._train = [taught(*pair) for pair in zip(train, planned, strict=True)]
        self._held = None
        self.eval_iters = 0  # steps of one exact pass over the held-out data
        if evaluation is not None and held is not None:
            self._held = taught(evaluation, held)
            self.eval_iters = held.packs_per_epoch // batch.evaluation

    @property
    def members(self) -> list[PackedDataset]:
        """The packs of each data set to train on."""
        return [member.packs for member in self._train]

    @property
    def evaluation(self) -> PackedDataset | None:
        """The held-out packs."""
        return None if self._held is None else self._held.packs

    @property
    def weighted(self) -> bool:
        """Whether some data set to train on has token weights: then every pack has."""
        return any(packs.data.card.weighted for packs in self.members)

    def training(self, *, with_teacher: bool, split: Any = None) -> TrainingPacks:
        """The packs to train on, endless.

        Args:
            with_teacher: with the teacher's records, which only a stage that computes the loss
                needs.
            split: what a loop's data loader wants to read from it (Megatron's `Split`).
        """
        return self._mixed(
            lambda member: member.packs.with_teacher(
                member.teacher if with_teacher else None, self.weighted, split
            ),
            split,
        )

    def held_out(self, *, with_teacher: bool, split: Any = None) -> PackedDataset | None:
        """The packs of an evaluation, or None; arguments as for `training`."""
        if self._held is None:
            return None
        packs, teacher = self._held.packs, self._held.teacher
        return packs.with_teacher(teacher if with_teacher else None, packs.weighted, split)

    def where(self, index: int) -> str:
        """What the training pack of a running number holds, for messages."""
        return self._plain.where(index)

    def supervised_tokens(self, start: int, stop: int) -> int:
        """Supervised tokens of the training packs [start, stop)."""
        return sum(self._plain.supervised_tokens(index) for index in range(start, stop))

    @functools.cached_property
    def _plain(self) -> TrainingPacks:
        """The packs to train on without a teacher's records."""
        return self._mixed(lambda member: member.packs, None)

    def _mixed(self, dress: Callable[[_Member], PackedDataset], split: Any) -> TrainingPacks:
        members = [dress(member) for member in self._train]
        return members[0] if len(members) == 1 else BlendedPacks(members, self.shares, split)
