"""Prepared conversations as an endless list of packs: item i is a function of seed and i alone."""

import copy
import functools
from collections import OrderedDict
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from megatron_tsft.data.pack_writer import PackWriter
from megatron_tsft.data.packing import EpochPlan, Ints, plan_epoch
from megatron_tsft.data.pieces import pieces_of
from megatron_tsft.data.prepared import PreparedData, Sample
from megatron_tsft.data.teacher_rows import (
    TeacherRows,
    TeacherSource,
    absent_rows,
    put_rows,
    to_pack,
)
from megatron_tsft.errors import UserError

# what len() says: the sampler never comes to an end, the loop stops by its own count
ENDLESS = 1 << 62


class PackedDataset(Dataset[dict[str, Tensor]]):
    """Packs of `seq_length` positions; an epoch is padded with masked packs to a multiple of the
    global batch.

    The order depends on the seed and the running number only, so a run resumes exactly from its
    count of consumed packs, whatever the number of data-parallel ranks.
    """

    def __init__(
        self,
        data: PreparedData,
        *,
        seq_length: int,
        global_batch_size: int,
        seed: int,
        long_samples: str = "refuse",
        document_multiple: int = 1,
        shuffle: bool = True,
    ):
        """Plan the first epoch.

        Args:
            data: the prepared conversations.
            seq_length: positions of a pack; a conversation of n tokens takes n - 1 (its last token
                is only a label).
            global_batch_size: packs of a step; an epoch is filled up to a multiple of it.
            seed: with the epoch, decides the packs and their order.
            long_samples: what happens to conversations that are longer than a pack (pieces.py).
            document_multiple: each conversation is padded to a multiple of it, which divides
                `seq_length`.
            shuffle: False repeats the same packs in the same order every epoch (evaluation).

        Raises:
            UserError: a conversation is too long and may not be cut, or there is none.
        """
        self.data, self.seq_length, self.seed, self.shuffle = data, seq_length, seed, shuffle
        self.split: Any = None  # what Megatron's data loader reads
        self.teacher: TeacherSource | None = None
        self.weighted = data.card.weighted
        self.pieces = pieces_of(data, seq_length, long_samples)
        self._room: Ints = -(-self.pieces.positions // document_multiple) * document_multiple
        self._plans: OrderedDict[int, EpochPlan] = OrderedDict()
        self.packs = len(self._plan(0))  # the same in every epoch: it follows from the lengths
        if not self.packs:
            raise UserError(f"{data.directory} holds no conversations: prepare the data again")
        self.packs_per_epoch = -(-self.packs // global_batch_size) * global_batch_size

    def __len__(self) -> int:
        return ENDLESS

    def _plan(self, epoch: int) -> EpochPlan:
        """The plan of an epoch; two are kept, because loader workers prefetch across the border."""
        if not self.shuffle:
            epoch = 0
        if epoch not in self._plans:
            self._plans[epoch] = plan_epoch(self._room, self.seq_length, self.seed, epoch)
            while len(self._plans) > 2:
                self._plans.popitem(last=False)
        return self._plans[epoch]

    def _pack(self, index: int) -> Ints:
        """The pieces in the pack of that running number; none in a masked pack."""
        epoch, slot = divmod(index, self.packs_per_epoch)
        return self._plan(epoch).pack(slot) if slot < self.packs else np.zeros(0, np.int64)

    def rows(self, index: int) -> list[int]:
        """The data set's rows in the pack of that running number; none in a masked pack."""
        return self.pieces.rows[self._pack(index)].tolist()

    @functools.cached_property
    def supervised(self) -> Ints:
        """[pieces] supervised tokens of each. Reads all masks once."""
        rows, starts, positions = self.pieces.rows, self.pieces.starts, self.pieces.positions
        counts = self.data.supervised()[rows]
        for piece in np.flatnonzero(positions < self.data.lengths[rows] - 1).tolist():
            first = int(starts[piece]) + 1
            mask = self.data.row(int(rows[piece])).loss_mask
            counts[piece] = mask[first : first + int(positions[piece])].sum()
        return counts

    @functools.cached_property
    def mute(self) -> int:
        """Conversations that were cut before their first supervised token."""
        if self.pieces.split or not self.pieces.long:
            return 0
        stops = self.pieces.positions + 1  # position t predicts token t + 1
        return int(((stops < self.data.lengths) & (self.data.supervised(stops) == 0)).sum())

    def supervised_tokens(self, index: int) -> int:
        """Supervised tokens of one pack."""
        return int(self.supervised[self._pack(index)].sum())

    def where(self, index: int) -> str:
        """What a pack holds, for messages."""
        ids = [self.data.sample_ids[row].as_py() for row in self.rows(index)]
        return f"pack {index} of {self.data.directory}, sample_ids {', '.join(ids) or 'none'}"

    def with_teacher(
        self, teacher: TeacherSource | None, weighted: bool, split: Any = None
    ) -> "PackedDataset":
        """The same packs with the teacher's records, if any, and always with token_weights if
        `weighted`.

        split: what a loop's data loader reads (Megatron's `Split`).
        """
        other = copy.copy(self)
        other.teacher, other.weighted, other.split = teacher, weighted, split
        return other

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """One pack, host tensors [seq_length]: tokens, labels, position_ids int64; token_weights
        float32 where the data has weights; index int64 scalar. Labels are shifted inside each
        conversation, never across.

        With a teacher also teacher_ids [seq_length, k] int32 and teacher_logprobs float16,
        teacher_label_logp [seq_length] float16 and teacher_tail_logmass float32; -1 and -inf where
        nothing is supervised.

        Raises:
            UserError: a conversation is damaged, or its teacher record is another conversation's.
        """
        size = self.seq_length
        pack, weights = PackWriter(size), np.ones(size, np.float32)
        taught = absent_rows(size, self.teacher.top_k) if self.teacher else None
        for piece in self._pack(index).tolist():
            row, start = int(self.pieces.rows[piece]), int(self.pieces.starts[piece])
            sample, stop = self.data.row(row), start + int(self.pieces.positions[piece]) + 1
            mask = sample.loss_mask[start:stop]
            place = pack.add(sample.input_ids[start:stop], mask, int(self._room[piece]))
            if sample.token_weights is not None:
                weights[place] = sample.token_weights[start + 1 : stop]
            records = self.teacher.rows(row) if self.teacher else None
            if taught is not None and records is not None:
                _check_length(records, sample)
                before = int(sample.loss_mask[: start + 1].sum())
                put_rows(taught, place.start + np.flatnonzero(mask[1:]), records, before)
        item = pack.arrays()
        if taught is not None:
            item |= to_pack(taught)
        if self.weighted:
            item["token_weights"] = weights
        tensors = {name: torch.from_numpy(values) for name, values in item.items()}
        return tensors | {"index": torch.tensor(index)}


def _check_length(records: TeacherRows, sample: Sample) -> None:
    """Raise UserError where the teacher's records are not of this conversation's tokens."""
    supervised = np.count_nonzero(sample.loss_mask)
    if len(records) != supervised:
        raise UserError(
            f"the teacher's record of conversation {sample.sample_id} has {len(records)} tokens,"
            f" the conversation {supervised}: make the cache again"
        )
