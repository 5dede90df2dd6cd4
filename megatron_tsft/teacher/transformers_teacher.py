"""A teacher from a Hugging Face folder, computed by transformers: a whole copy on each rank."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_tsft.data.prepared import Sample
from megatron_tsft.data.teacher_rows import TeacherRows
from megatron_tsft.errors import UserError
from megatron_tsft.loss.records import TeacherRecords
from megatron_tsft.teacher.job import Progress, as_rows
from megatron_tsft.teacher.topk import teacher_topk


class TransformersTeacher:
    """A causal language model; batches are conversations of similar length, padded on the right."""

    writes = True

    def __init__(
        self,
        folder: Path,
        *,
        dtype: torch.dtype,
        device: str,
        top_k: int,
        temperature: float,
        vocab_size: int,
        token_map: Sequence[int] | None,
        batch_tokens: int,
        share: tuple[int, int],
    ):
        """Load the model.

        Args:
            vocab_size: ids at or beyond it get no mass.
            token_map: the teacher's id of each token of the data's vocabulary, -1 for none; None
                where they are equal.
            batch_tokens: positions of a batch, padding included; a longer conversation is a batch
                of its own.
            share: (this rank, ranks).

        Raises:
            UserError: transformers cannot load it.
        """
        from transformers import AutoModelForCausalLM

        try:
            model: Any = AutoModelForCausalLM.from_pretrained(
                str(folder), dtype=dtype, local_files_only=True
            )
        except (OSError, ValueError, KeyError) as error:
            raise UserError(
                f"transformers cannot load {folder}: {' '.join(str(error).split())[:300]}"
            ) from error
        self.model = model.eval().requires_grad_(False).to(device)
        self.device, self.top_k, self.temperature, self.vocab_size = (
            device,
            top_k,
            temperature,
            vocab_size,
        )
        self.batch_tokens, self.share = batch_tokens, share
        self.columns = None if token_map is None else torch.tensor(token_map, device=device)

    def predict(self, conversations: Sequence[Sample], progress: Progress) -> list[TeacherRows]:
        """The records of some conversations, in their order."""
        lengths = np.array([len(sample.input_ids) for sample in conversations])
        order = np.argsort(-lengths, kind="stable").tolist()
        records: dict[int, TeacherRows] = {}
        while order:
            count = max(1, self.batch_tokens // int(lengths[order[0]]))
            batch, order = order[:count], order[count:]
            samples = [conversations[i] for i in batch]
            records |= dict(zip(batch, self._batch(samples), strict=True))
            progress.tokens(sum(len(records[i]) for i in batch))
        return [records[i] for i in range(len(conversations))]

    @torch.no_grad()
    def _batch(self, samples: Sequence[Sample]) -> list[TeacherRows]:
        """samples: the longest first."""
        width = len(samples[0].input_ids)
        tokens = torch.zeros(len(samples), width, dtype=torch.int64)
        mask, attention = torch.zeros_like(tokens, dtype=torch.bool), torch.zeros_like(tokens)
        for i, sample in enumerate(samples):
            n = len(sample.input_ids)
            tokens[i, :n] = torch.from_numpy(sample.input_ids.astype(np.int64))
            mask[i, :n], attention[i, :n] = torch.from_numpy(np.array(sample.loss_mask)), 1
        tokens, attention = tokens.to(self.device), attention.to(self.device)
        seen = tokens if self.columns is None else self.columns[tokens].clamp(min=0)
        logits = self.model(input_ids=seen, attention_mask=attention, use_cache=False).logits
        parts = [
            self._topk(logits[i, :-1][mask[i, 1:]], tokens[i, 1:][mask[i, 1:]])
            for i in range(len(samples))
        ]
        return [as_rows(part, [len(part.ids)])[0] for part in parts]

    def _topk(self, logits: torch.Tensor, labels: torch.Tensor) -> TeacherRecords[torch.Tensor]:
        """logits [n, teacher's vocabulary], labels [n]."""
        absent = None
        if self.columns is not None:
            logits = logits[:, self.columns.clamp(min=0)]
            absent = self.columns < 0
        return teacher_topk(
            logits,
            labels,
            self.top_k,
            vocab_size=self.vocab_size,
            temperature=self.temperature,
            absent=absent,
        )
