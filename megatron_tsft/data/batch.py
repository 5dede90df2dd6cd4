"""One micro-batch of packs as the model and the loss want it: documents in a single row."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_tsft.data.context_parallel import positions_on_rank
from megatron_tsft.data.teacher_rows import from_pack
from megatron_tsft.loss.records import Tail, TeacherRecords


@dataclass(frozen=True)
class MicroBatch:
    """`mbs` packs of `s` positions laid end to end; documents never attend across their borders.

    A context-parallel rank holds its chunks of every document: t = mbs * s / (context-parallel
    size).

    Attributes:
        tokens: [1, t] int64.
        labels: [1, t] int64, the next token of the same document; -100 where unsupervised.
        position_ids: [1, t] int64, from 0 in each document.
        token_weights: [1, t] float32, or None where the data has none.
        sequence_ids: [1, t] int64 in [0, num_sequences): the document of each position.
        lengths: positions of each whole document, in order; they add up to mbs * s (the tail is a
            document of its own).
        index: the data set's running numbers of the packs.
        dataset_ids: [1, t] int64, which data set of a mixture each position comes from; None
            without a mixture.
        teacher: cached records, ids [1, t, k]; None without a cache, or on a stage that computes no
            loss.
        teacher_tail: what a cached teacher says of the tokens outside its top-k.
    """

    tokens: Tensor
    labels: Tensor
    position_ids: Tensor
    token_weights: Tensor | None
    sequence_ids: Tensor
    lengths: list[int]
    index: list[int]
    dataset_ids: Tensor | None = None
    teacher: TeacherRecords[Tensor] | None = None
    teacher_tail: Tail = "uniform"

    @property
    def num_sequences(self) -> int:
        return len(self.lengths)

    @staticmethod
    def from_packs(
        packs: Mapping[str, Tensor],
        device: torch.device | str,
        tail: Tail = "uniform",
        context_rank: int = 0,
        context_size: int = 1,
    ) -> "MicroBatch":
        """From the data loader's dictionary of [mbs, s] host tensors (stacked items of a
        PackedDataset).

        Args:
            packs: the same on every rank of a context-parallel group.
            device: where the batch goes.
            tail: what a cached teacher says of the tokens outside its top-k.
            context_rank: this rank in its context-parallel group.
            context_size: of that group; every document's length is a multiple of twice as much.
        """
        position_ids = packs["position_ids"].reshape(-1)
        starts = torch.nonzero(position_ids == 0)[:, 0]  # on the host: no device is asked
        ends = torch.cat([starts[1:], starts.new_tensor([position_ids.numel()])])
        lengths = (ends - starts).tolist()
        held = (
            positions_on_rank(lengths, context_rank, context_size)
            if context_size > 1
            else slice(None)
        )

        def here(values: Tensor) -> Tensor:
            return values[None, held].to(device, non_blocking=True)

        def row(values: Tensor) -> Tensor:
            return here(values.reshape(-1))

        records = from_pack(packs)
        dataset_ids = None
        if "dataset" in packs:
            dataset_ids = row(packs["dataset"].reshape(-1, 1).expand_as(packs["tokens"]))
        return MicroBatch(
            tokens=row(packs["tokens"]),
            labels=row(packs["labels"]),
            position_ids=row(position_ids),
            token_weights=row(packs["token_weights"]) if "token_weights" in packs else None,
            sequence_ids=row((position_ids == 0).cumsum(0) - 1),
            lengths=lengths,
            index=packs["index"].reshape(-1).tolist(),
            dataset_ids=dataset_ids,
            # [mbs, s, ...] each, laid end to end
            teacher=None if records is None else records.map(lambda x: here(x.flatten(0, 1))),
            teacher_tail=tail,
        )
