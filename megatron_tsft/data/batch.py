"""One micro-batch of packs as the model and the loss want it: a single row of documents, one after the other."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megatron_tsft.loss.records import TeacherTopK


@dataclass(frozen=True)
class MicroBatch:
    """`mbs` packs of `s` positions laid end to end, t = mbs * s; documents never attend across their borders.

    Attributes:
        tokens: [1, t] int64.
        labels: [1, t] int64, the next token of the same document; -100 where unsupervised.
        position_ids: [1, t] int64, from 0 in each document.
        token_weights: [1, t] float32, or None where the data has none.
        sequence_ids: [1, t] int64 in [0, num_sequences): the document of each position.
        lengths: positions of each document, in order; they add up to t (padding is a document of its own).
        index: the data set's running numbers of the packs.
        dataset_ids: [1, t] int64, which data set of a mixture each position comes from; None without a mixture.
        teacher: cached records, ids [1, t, k]; None without a cache, or on a stage that computes no loss.
    """

    tokens: Tensor
    labels: Tensor
    position_ids: Tensor
    token_weights: Tensor | None
    sequence_ids: Tensor
    lengths: list[int]
    index: list[int]
    dataset_ids: Tensor | None = None
    teacher: TeacherTopK | None = None

    @property
    def num_sequences(self) -> int:
        return len(self.lengths)

    @staticmethod
    def from_packs(
        packs: Mapping[str, Tensor], device: torch.device | str, tail: Literal["uniform", "drop"] = "uniform"
    ) -> "MicroBatch":
        """From the data loader's dictionary of [mbs, s] host tensors (stacked items of a PackedDataset).

        tail: what a cached teacher says of the tokens outside its top-k.
        """
        position_ids = packs["position_ids"].reshape(-1)
        starts = torch.nonzero(position_ids == 0)[:, 0]  # on the host: no device is asked
        ends = torch.cat([starts[1:], starts.new_tensor([position_ids.numel()])])

        def row(values: Tensor) -> Tensor:
            return values.reshape(1, -1).to(device, non_blocking=True)

        teacher = dataset_ids = None
        if "teacher_ids" in packs:
            k = packs["teacher_ids"].shape[-1]
            teacher = TeacherTopK(
                packs["teacher_ids"].reshape(1, -1, k).to(device, non_blocking=True),
                packs["teacher_logprobs"].reshape(1, -1, k).to(device, non_blocking=True),
                tail,
                label_logprobs=row(packs["teacher_label"]),
                tail_logmass=row(packs["teacher_tail"]),
            )
        if "dataset" in packs:
            dataset_ids = row(packs["dataset"].reshape(-1, 1).expand_as(packs["tokens"]))
        return MicroBatch(
            tokens=row(packs["tokens"]),
            labels=row(packs["labels"]),
            position_ids=row(position_ids),
            token_weights=row(packs["token_weights"]) if "token_weights" in packs else None,
            sequence_ids=row((position_ids == 0).cumsum(0) - 1),
            lengths=(ends - starts).tolist(),
            index=packs["index"].reshape(-1).tolist(),
            dataset_ids=dataset_ids,
            teacher=teacher,
        )
