"""Writes the prepared format (prepared.py), one Arrow file after the other, in a constant amount of
memory; only the description beside them is made by `datasets`."""

import contextlib
import hashlib
import json
import os
import shutil
from array import array
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from megatron_tsft.data.chat import Encoded
from megatron_tsft.data.prepared import (
    SCHEMA,
    UNWEIGHTED,
    DataCard,
    sample_id,
    weights_check,
)

BATCH_ROWS = 1000
BATCH_TOKENS = 1 << 22  # what is held in memory
FILE_BYTES = 500 << 20


class PreparedWriter:
    """Collects conversations in `folder`; `finish` completes it to a data set with its card."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: list[Path] = []
        self._stream: pa.OSFile | None = None
        self._writer: Any = None
        # without weights, until a row has some
        self._schema = pa.schema([SCHEMA.field(name) for name in UNWEIGHTED])
        self._rows: list[Encoded] = []
        self._held = 0
        self._digest = hashlib.blake2b(digest_size=16)  # prepared.dataset_fingerprint
        self._ids = array("Q")  # the first half of every sample_id, to count equal ones
        self.conversations = self.tokens = self.supervised_tokens = self.longest = (
            self.vocab_size
        ) = 0
        self.weighted = self.negative_weights = self.templated = False
        self.truncated = 0
        self.ends = Counter[int]()
        self._spare.mkdir()

    @property
    def _spare(self) -> Path:
        return self._folder / "tmp"

    @property
    def spare_file(self) -> Path:
        """Where the caller may have a file until `finish`."""
        return self._spare / "spare"

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
        """Close what is open; safe to call again."""
        if self._stream is not None:
            self._writer.close()
            self._stream.close()
            self._stream = None

    def finish(self, **facts: Any) -> DataCard:
        """Complete the folder; its card comes last. facts: the card's fields that only the caller
        knows."""
        if self._rows:
            self._flush()
        self.close()
        count = len(self._files)
        names = [f"data-{i:05d}-of-{count:05d}.arrow" for i in range(count)]
        for path, name in zip(self._files, names, strict=True):
            os.replace(path, self._folder / name)
        fingerprint = self._digest.hexdigest()
        self._describe(names, fingerprint)
        shutil.rmtree(self._spare)
        card = DataCard(
            vocab_size=self.vocab_size,
            fingerprint=fingerprint,
            conversations=self.conversations,
            tokens=self.tokens,
            supervised_tokens=self.supervised_tokens,
            longest=self.longest,
            weighted=self.weighted,
            negative_weights=self.negative_weights,
            duplicates=_repeated(self._ids),
            truncated=self.truncated,
            files={name: (self._folder / name).stat().st_size for name in names},
            **facts,
        )
        card.save(self._folder)
        return card

    def _describe(self, names: list[str], fingerprint: str) -> None:
        """Write what `datasets` reads beside the Arrow files: that of an empty data set of the same
        columns, with our files' names. One fingerprint for the content, where datasets' own would
        hash the time: equal inputs give equal folders."""
        from datasets import Dataset
        from datasets.table import InMemoryTable

        empty, none = self._spare / "described", InMemoryTable(self._schema.empty_table())
        with _no_progress_bars():
            Dataset(none, fingerprint=fingerprint).save_to_disk(str(empty))
        state = json.loads((empty / "state.json").read_text())
        state["_data_files"] = [{"filename": name} for name in names]
        (self._folder / "state.json").write_text(json.dumps(state, indent=2, sort_keys=True))
        os.replace(empty / "dataset_info.json", self._folder / "dataset_info.json")

    def _flush(self) -> None:
        rows, self._rows, self._held = self._rows, [], 0
        if self.weighted and len(self._schema) < len(SCHEMA):  # the first weights
            self.close()
            self._schema = SCHEMA
            for path in self._files:
                _add_weights(path)
        ids = [sample_id(row.input_ids, row.loss_mask) for row in rows]
        self._digest.update("".join(ids).encode())
        self._ids.extend(int(name[:16], 16) for name in ids)
        lengths = np.array([len(row.input_ids) for row in rows], np.int32)
        offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
        columns = [
            pa.array(ids),
            pa.array(lengths),
            pa.ListArray.from_arrays(offsets, np.concatenate([row.input_ids for row in rows])),
            pa.ListArray.from_arrays(offsets, np.concatenate([row.loss_mask for row in rows])),
        ]
        if self.weighted:
            weights = [
                _full(row.loss_mask) if row.token_weights is None else row.token_weights
                for row in rows
            ]
            columns.append(pa.ListArray.from_arrays(offsets, np.concatenate(weights)))
            columns.append(pa.array([weights_check(row) for row in weights], pa.int64()))
        if self._stream is None:
            self._open()
        self._writer.write_batch(pa.record_batch(columns, schema=self._schema))
        if self._stream is not None and self._stream.tell() >= FILE_BYTES:
            self.close()

    def _open(self) -> None:
        """Begin another file."""
        path = self._folder / f"part-{len(self._files):05d}.arrow"
        self._files.append(path)
        self._stream = pa.OSFile(str(path), "wb")
        self._writer = pa.ipc.new_stream(self._stream, self._schema)


@contextlib.contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Inside, `datasets` shows none."""
    from datasets.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    before = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not before:
            enable_progress_bars()


def _repeated(numbers: array[int]) -> int:
    """How many of them are there already; they are sorted in place, in no other memory."""
    if not numbers:
        return 0
    ids = np.frombuffer(numbers, np.uint64)
    ids.sort()
    return int(np.count_nonzero(ids[1:] == ids[:-1]))


def _full(mask: np.ndarray) -> np.ndarray:
    """In a weighted data set a row without weights counts fully."""
    return mask.astype(np.float32)


def _add_weights(path: Path) -> None:
    """Give the rows of a file, which have none, weights."""
    new = path.with_suffix(".new")
    with pa.OSFile(str(path)) as source, pa.OSFile(str(new), "wb") as sink:
        reader = pa.ipc.open_stream(source)
        with pa.ipc.new_stream(sink, SCHEMA) as writer:
            for batch in reader:
                mask = batch.column("loss_mask")
                flat = _full(mask.flatten().to_numpy(zero_copy_only=False))
                weights = pa.ListArray.from_arrays(mask.offsets, flat)
                checks = [weights_check(row.values.to_numpy()) for row in weights]
                columns = [*batch.columns, weights, pa.array(checks, pa.int64())]
                writer.write_batch(pa.record_batch(columns, schema=SCHEMA))
    os.replace(new, path)
