"""Writes the prepared format (prepared.py): rows go to one Arrow stream, which `datasets` then
saves as its folder."""

import contextlib
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from megatron_tsft.data.chat import Encoded
from megatron_tsft.data.prepared import SCHEMA, DataCard, dataset_fingerprint, sample_id

BATCH_ROWS = 1000
BATCH_TOKENS = 1 << 22  # what is held in memory
STREAM = (
    "tmp/rows.arrow"  # a folder of its own: datasets refuses to save beside the file that it reads
)


class PreparedWriter:
    """Collects conversations in `folder`; `finish` turns them into a data set with its card."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        (folder / STREAM).parent.mkdir()
        self._stream = pa.OSFile(str(folder / STREAM), "wb")
        self._writer = pa.ipc.new_stream(self._stream, SCHEMA)
        self._rows: list[Encoded] = []
        self._held = 0
        self.conversations = self.tokens = self.supervised_tokens = self.longest = (
            self.vocab_size
        ) = 0
        self.weighted = self.negative_weights = self.templated = False
        self.truncated = 0
        self.ends = Counter[int]()

    @property
    def spare_file(self) -> Path:
        """Where the caller may have a file until `finish`."""
        return (self._folder / STREAM).with_name("spare")

    def add(self, row: Encoded) -> None:
        """Append one conversation; its arrays are kept until the batch is full."""
        length = len(row.input_ids)
        self.conversations += 1
        self.tokens += length
        self.supervised_tokens += int(row.loss_mask.sum())
        self.longest = max(self.longest, length)
        self.vocab_size = max(self.vocab_size, int(row.input_ids.max()) + 1)
        self.templated |= row.templated
        self.truncated += row.truncated
        if row.end is not None:
            self.ends[row.end] += 1
        if row.token_weights is not None:
            self.weighted = True
            self.negative_weights |= bool((row.token_weights < 0).any())
        self._rows.append(row)
        self._held += length
        if len(self._rows) == BATCH_ROWS or self._held >= BATCH_TOKENS:
            self._flush()

    def close(self) -> None:
        """Close the stream; safe to call again."""
        if not self._stream.closed:
            self._writer.close()
            self._stream.close()

    def finish(self, *, progress: bool, **facts: Any) -> DataCard:
        """Save the folder and its card, which comes last. facts: the card's fields that only the
        caller knows."""
        from datasets import Dataset
        from datasets.table import MemoryMappedTable

        if self._rows:
            self._flush()
        self.close()
        table = MemoryMappedTable.from_file(str(self._folder / STREAM))
        if not self.weighted:  # known at the end only, so the stream always has the column
            table = table.drop(["token_weights"])
        ids = table.column("sample_id")
        # one fingerprint for the content, where datasets' own
        # would hash the time: equal inputs give equal folders
        fingerprint = dataset_fingerprint(
            chunk_id for chunk in ids.chunks for chunk_id in chunk.to_pylist()
        )
        with _progress_bars(progress):
            Dataset(table, fingerprint=fingerprint).save_to_disk(str(self._folder))
        duplicates = self.conversations - len(ids.unique())
        del table, ids
        shutil.rmtree((self._folder / STREAM).parent)
        card = DataCard(
            vocab_size=self.vocab_size,
            fingerprint=fingerprint,
            conversations=self.conversations,
            tokens=self.tokens,
            supervised_tokens=self.supervised_tokens,
            longest=self.longest,
            weighted=self.weighted,
            negative_weights=self.negative_weights,
            duplicates=duplicates,
            truncated=self.truncated,
            files={path.name: path.stat().st_size for path in sorted(self._folder.glob("*.arrow"))},
            **facts,
        )
        card.save(self._folder)
        return card

    def _flush(self) -> None:
        rows, self._rows, self._held = self._rows, [], 0
        lengths = np.array([len(row.input_ids) for row in rows], np.int32)
        offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
        # in a weighted data set a row without weights counts fully
        weights = [
            row.loss_mask.astype(np.float32) if row.token_weights is None else row.token_weights
            for row in rows
        ]
        columns = [
            pa.array([sample_id(row.input_ids, row.loss_mask) for row in rows]),
            pa.array(lengths),
            pa.ListArray.from_arrays(offsets, np.concatenate([row.input_ids for row in rows])),
            pa.ListArray.from_arrays(offsets, np.concatenate([row.loss_mask for row in rows])),
            pa.ListArray.from_arrays(offsets, np.concatenate(weights)),
        ]
        self._writer.write_batch(pa.record_batch(columns, schema=SCHEMA))


@contextlib.contextmanager
def _progress_bars(show: bool) -> Iterator[None]:
    """Inside, `datasets` shows its progress bars only where `show` says so."""
    from datasets.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    before = are_progress_bars_disabled()
    if not show:
        disable_progress_bars()
    try:
        yield
    finally:
        if not show and not before:
            enable_progress_bars()
