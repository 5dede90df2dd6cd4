"""A teacher from a Hugging Face folder, computed by transformers: a whole copy on each rank."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_tsft.checkpoint.tokenizer import own_code
from megatron_tsft.data.pack_writer import IGNORED, write_pack
from megatron_tsft.data.prepared import Sample
from megatron_tsft.data.teacher_rows import TeacherRows
from megatron_tsft.errors import UserError
from megatron_tsft.loss.records import TeacherRecords
from megatron_tsft.teacher.job import Progress, Share, as_rows
from megatron_tsft.teacher.request import Question
from megatron_tsft.teacher.topk import teacher_topk
from megatron_tsft.trust import trusted

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class TransformersTeacher:
    """A causal language model; batches are conversations of similar length, padded on the right."""

    writes = True

    def __init__(self, folder: Path, question: Question, dtype: str, device: str, share: Share):
        """Load the model.

        Args:
            folder: a Hugging Face folder.
            question: what it is asked; a conversation that is longer than its batch_tokens is a
                batch of its own.
            dtype: a key of DTYPES.
            device: "cuda" or "cpu"; under torchrun each rank has a GPU of its own.
            share: which shards this rank computes.

        Raises:
            UserError: transformers cannot load it.
        """
        from transformers import AutoModelForCausalLM

        if device == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        try:
            model: Any = AutoModelForCausalLM.from_pretrained(
                str(folder),
                dtype=DTYPES[dtype],
                local_files_only=True,
                trust_remote_code=trusted(),
            )
        except (OSError, ValueError, KeyError) as error:
            if refusal := own_code(error, f"the model in {folder}"):
                raise refusal from error
            text = " ".join(str(error).split())[:300]
            raise UserError(f"transformers cannot load {folder}: {text}") from error
        self.model = model.eval().requires_grad_(False).to(device)
        self.device, self.question, self._share = device, question, share
        token_map = question.token_map
        self.columns = None if token_map is None else torch.tensor(token_map, device=device)

    @property
    def share(self) -> Share:
        return self._share

    def predict(self, conversations: Sequence[Sample], progress: Progress) -> list[TeacherRows]:
        """The records of some conversations, in their order."""
        lengths = np.array([len(sample.input_ids) for sample in conversations])
        order = np.argsort(-lengths, kind="stable").tolist()
        records: dict[int, TeacherRows] = {}
        while order:
            count = max(1, self.question.batch_tokens // int(lengths[order[0]]))
            batch, order = order[:count], order[count:]
            samples = [conversations[i] for i in batch]
            records |= dict(zip(batch, self._batch(samples), strict=True))
            progress.tokens(sum(len(records[i]) for i in batch))
        return [records[i] for i in range(len(conversations))]

    @torch.no_grad()
    def _batch(self, samples: Sequence[Sample]) -> list[TeacherRows]:
        """samples: the longest first."""
        lengths = torch.tensor([max(len(sample.input_ids) - 1, 1) for sample in samples])
        width = int(lengths[0])
        packs = [write_pack([sample], width) for sample in samples]
        tokens = torch.from_numpy(np.stack([pack["tokens"] for pack in packs])).to(self.device)
        labels = torch.from_numpy(np.stack([pack["labels"] for pack in packs])).to(self.device)
        attention = (torch.arange(width) < lengths[:, None]).to(self.device, torch.int64)
        seen = tokens if self.columns is None else self.columns[tokens].clamp(min=0)
        logits = self.model(input_ids=seen, attention_mask=attention, use_cache=False).logits
        records = []
        for own, label in zip(logits, labels, strict=True):
            supervised = label != IGNORED
            part = self._topk(own[supervised], label[supervised])
            records += as_rows(part, [len(part)])
        return records

    def _topk(self, logits: torch.Tensor, labels: torch.Tensor) -> TeacherRecords[torch.Tensor]:
        """logits [n, teacher's vocabulary], labels [n]."""
        absent = None
        if self.columns is not None:
            logits = logits[:, self.columns.clamp(min=0)]
            absent = self.columns < 0
        return teacher_topk(
            logits,
            labels,
            self.question.top_k,
            vocab_size=self.question.vocab_size,
            temperature=self.question.temperature,
            absent=absent,
        )
