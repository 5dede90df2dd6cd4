"""A teacher at the student's vocabulary: its padding, its token map, the columns it lacks."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_tsft.checkpoint.torch_dist_reader import CheckpointReader

EMBEDDING, HEAD = "embedding.word_embeddings.weight", "output_layer.weight"
ROWS = 16384  # of a vocabulary matrix that are read at once


@dataclass(frozen=True)
class TeacherVocabulary:
    """How a teacher's tokens and the student's correspond.

    size: the teacher's own vocabulary. token_map: [student's vocabulary] the teacher's id of each
    token, -1 where it has none; None where both have the same ids.
    """

    size: int
    token_map: Sequence[int] | None = None

    def rows(self, first: int, count: int) -> Tensor:
        """[count] int64: the teacher's row for the student's tokens from `first` on, or -1."""
        if self.token_map is None:
            rows = torch.arange(first, first + count)
            return torch.where(rows < self.size, rows, -1)
        padded = [*self.token_map[first : first + count], *[-1] * count][:count]
        return torch.tensor(padded, dtype=torch.int64)

    def absent(self, first: int, count: int, vocab_size: int) -> Tensor | None:
        """[count] bool: columns from `first` on that are tokens of the student's but not of the
        teacher's; None if no column is."""
        columns = torch.arange(first, first + count)
        missing = (self.rows(first, count) < 0) & (columns < vocab_size)
        return missing if bool(missing.any()) else None


def load_mapped_rows(
    teacher: Any, checkpoint: Path, vocabulary: TeacherVocabulary, tp_rank: int
) -> None:
    """Fill a stage's embedding and head by the token map, from the checkpoint's own rows; zeros
    where it has none."""
    reader = CheckpointReader(checkpoint)
    tied = HEAD not in reader.metadata.state_dict_metadata
    matrices = []
    if teacher.pre_process:
        matrices.append((EMBEDDING, teacher.embedding.word_embeddings.weight))
    if teacher.post_process and not (tied and teacher.pre_process):
        matrices.append((EMBEDDING if tied else HEAD, teacher.output_layer.weight))
    for key, weight in matrices:
        rows = vocabulary.rows(tp_rank * len(weight), len(weight))
        values = torch.zeros(weight.shape, dtype=weight.dtype)
        for start in range(0, vocabulary.size, ROWS):
            count = min(ROWS, vocabulary.size - start)
            part = reader.read(key, (start, 0), (count, weight.shape[1])).to(weight.dtype)
            here = (rows >= start) & (rows < start + count)
            values[here] = part[rows[here] - start]
        with torch.no_grad():
            weight.copy_(values)
