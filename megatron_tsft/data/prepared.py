"""The prepared data set: its format, its card and its reader.

A folder that Hugging Face `datasets` opens (`load_from_disk`), with a card `tsft_data.json` beside
the Arrow files. One row per conversation, in the order of the input:

    sample_id      string         32 hex digits over input_ids and loss_mask; a teacher's records
                                  are keyed by it, so token_weights do not count, which no
                                  teacher sees
    length         int32          tokens, so that packs are planned without reading any
    input_ids      list<int32>    [length]
    loss_mask      list<bool>     [length] True where the token is a target; never at 0, which
                                  nothing predicts
    token_weights  list<float32>  [length] 0 outside the mask
    weights_check  int64          a checksum over token_weights, as sample_id is one over the rest;
                                  these two columns are there only where a row of the input had
                                  `weight` or `critical`
"""

import bisect
import hashlib
import os
import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from megatron_tsft.cards import load_card, save_card
from megatron_tsft.errors import UserError
from megatron_tsft.inside import inside
from megatron_tsft.typed import Count

CARD_FILE = "tsft_data.json"
FORMAT_VERSION = 2
SCHEMA = pa.schema(
    {
        "sample_id": pa.string(),
        "length": pa.int32(),
        "input_ids": pa.list_(pa.int32()),
        "loss_mask": pa.list_(pa.bool_()),
        "token_weights": pa.list_(pa.float32()),
        "weights_check": pa.int64(),
    }
)
# the columns of data without weights
UNWEIGHTED = SCHEMA.names[: SCHEMA.get_field_index("token_weights")]
REMEDY = (
    "the copy is incomplete or the disk damaged it: prepare the data again with"
    " tools/prepare_data.py --overwrite"
)


@dataclass(frozen=True)
class DataCard:
    """What a prepared folder holds, and what was left out of it.

    Attributes:
        tokenizer_fingerprint: of checkpoint.tokenizer.
        vocab_size: the largest id + 1, which a model must have at least.
        fingerprint: 32 hex digits over all sample_ids in order.
        longest: tokens of the longest conversation.
        weighted: there is a column token_weights.
        negative_weights: some of them are below 0, which an objective must be able to take.
        date: the day that chat templates were told, YYYY-MM-DD.
        made_with: what else decided the tokens: option of the preparation -> its value.
        turn_ends: token that ends conversations -> (its id, how many).
        chat_template: Jinja text that wrote them; None where no template did.
        duplicates: conversations whose sample_id occurred before; they are kept.
        truncated: conversations that were cut to --max-tokens.
        refused: reason -> count.
        refused_lines: reason -> its first line numbers, with file names where there are several.
        files: Arrow file -> bytes.
    """

    tokenizer_fingerprint: str
    vocab_size: Count
    fingerprint: str
    conversations: Count
    tokens: Count
    supervised_tokens: int
    longest: Count
    weighted: bool
    negative_weights: bool = False
    date: str = ""
    made_with: dict[str, Any] = field(default_factory=dict)
    turn_ends: dict[str, tuple[int, int]] = field(default_factory=dict)
    chat_template: str | None = None
    duplicates: int = 0
    truncated: int = 0
    refused: dict[str, int] = field(default_factory=dict)
    refused_lines: dict[str, list[int | str]] = field(default_factory=dict)
    files: dict[str, int] = field(default_factory=dict)

    @staticmethod
    def load(directory: Path | str) -> "DataCard":
        """The card of a prepared folder.

        Raises:
            UserError: there is none, or it was written by another version.
        """
        missing = (
            f"{directory} has no {CARD_FILE}: make the folder with `tools/prepare_data.py --input"
            " FILE.jsonl --tokenizer DIR --output DIR`"
        )
        path = Path(directory) / CARD_FILE
        return load_card(
            DataCard,
            path,
            FORMAT_VERSION,
            what="data card",
            missing=missing,
            again="prepare the data again",
        )

    def save(self, directory: Path | str) -> None:
        """Write the card into a folder, atomically and last: a folder with a card is complete."""
        save_card(self, Path(directory) / CARD_FILE, FORMAT_VERSION)


@dataclass(frozen=True)
class Sample:
    """One conversation; the arrays are read-only views of the file where Arrow allows."""

    sample_id: str
    input_ids: np.ndarray  # [n] int32
    loss_mask: np.ndarray  # [n] bool
    token_weights: np.ndarray | None  # [n] float32


def sample_id(input_ids: np.ndarray, loss_mask: np.ndarray) -> str:
    """32 hex digits over tokens [n] and mask [n]: on every machine the same for equal ones."""
    ids = np.ascontiguousarray(input_ids, "<i4")
    return hashlib.blake2b(
        ids.tobytes() + np.packbits(loss_mask).tobytes(), digest_size=16
    ).hexdigest()


def weights_check(weights: np.ndarray) -> int:
    """64 bits, as a signed number, over weights [n]."""
    values = np.ascontiguousarray(weights, "<f4")
    return int.from_bytes(xxhash.xxh3_64_digest(values.tobytes()), "little", signed=True)


def dataset_fingerprint(sample_ids: Iterable[str | memoryview]) -> str:
    """32 hex digits over all sample_ids in order; pieces may hold several ids each."""
    digest = hashlib.blake2b(digest_size=16)
    for piece in sample_ids:
        digest.update(piece.encode() if isinstance(piece, str) else piece)
    return digest.hexdigest()


class PreparedData:
    """A memory-mapped prepared folder: `load` it, `len()`, `lengths`, `row(i)`. Pickling sends the
    path alone."""

    def __init__(self, directory: Path, card: DataCard, table: pa.Table) -> None:
        self.directory = directory
        self.card = card
        self.lengths: np.ndarray = table["length"].to_numpy().astype(np.int64)  # [rows]
        self.sample_ids: pa.ChunkedArray = table["sample_id"]  # [rows] string
        self._batches = table.to_batches()
        # of each file: a descriptor, which stays the mapped file's, its path and its size
        self._files: list[tuple[int, Path, int]] = []
        weakref.finalize(self, _close, self._files)
        for name, size in card.files.items():
            path = directory / name
            self._files.append((os.open(path, os.O_RDONLY), path, size))
        self._starts = np.cumsum([0, *(batch.num_rows for batch in self._batches)]).tolist()

    @staticmethod
    def load(directory: Path | str) -> "PreparedData":
        """Open a folder. Everything but tokens, masks and weights is checked here; `row` checks
        those of its row.

        Raises:
            UserError: no card, or an Arrow file that is missing, cut short or damaged.
        """
        directory = Path(directory)
        card = DataCard.load(directory)
        table = _read_table(directory, card)
        data = PreparedData(directory, card, table)
        lists = [table[name] for name in ("input_ids", "loss_mask")]
        lists += [table["token_weights"]] if card.weighted else []
        ids = (memoryview(_text_bytes(chunk)) for chunk in table["sample_id"].chunks)
        whole = (
            len(data) == card.conversations
            and int(data.lengths.sum()) == card.tokens
            and not any(column.null_count for column in table.columns)
            and all(np.array_equal(_list_lengths(column), data.lengths) for column in lists)
            and all(
                (np.diff(_text_offsets(chunk)) == 32).all() for chunk in table["sample_id"].chunks
            )
            and dataset_fingerprint(ids) == card.fingerprint
        )
        if not whole:
            raise UserError(
                f"{directory} does not hold the {card.conversations} conversations of its card:"
                f" {REMEDY}"
            )
        return data

    def __len__(self) -> int:
        return len(self.lengths)

    def supervised(self, stops: np.ndarray | None = None) -> np.ndarray:
        """[rows] int64: supervised tokens of each conversation, or of its first stops[row] tokens.
        Reads every mask."""
        counts = [np.zeros(0, np.int64)]
        for start, batch in zip(self._starts, self._batches, strict=False):
            masks = batch.column("loss_mask")
            ends = np.concatenate(
                [[0], np.cumsum(masks.flatten().to_numpy(zero_copy_only=False), dtype=np.int64)]
            )
            offsets = masks.offsets.to_numpy() - masks.offsets[0].as_py()
            until = offsets[1:]
            if stops is not None:
                until = np.minimum(until, offsets[:-1] + stops[start : start + batch.num_rows])
            counts.append(ends[until] - ends[offsets[:-1]])
        return np.concatenate(counts)

    def weights_digest(self) -> str:
        """16 hex digits over the weights of all rows; "none" where there are none."""
        if not self.card.weighted:
            return "none"
        digest = hashlib.sha256()
        for batch in self._batches:
            digest.update(batch.column("weights_check").to_numpy().tobytes())
        return digest.hexdigest()[:16]

    def used_tokens(self) -> np.ndarray:
        """[card.vocab_size] bool: the token ids that occur. Reads every conversation.

        Raises:
            UserError: the card says another vocabulary.
        """
        parts = [batch.column("input_ids").flatten().to_numpy() for batch in self._batches]
        end = max(int(ids.max(initial=-1)) for ids in parts) + 1
        if end != self.card.vocab_size or min(int(ids.min(initial=0)) for ids in parts) < 0:
            raise UserError(
                f"{self.directory} holds token ids below {end}, its card says"
                f" vocab_size={self.card.vocab_size}: {REMEDY}"
            )
        used = np.zeros(end, bool)
        for ids in parts:
            used[ids] = True
        return used

    def __reduce__(self) -> tuple[Any, ...]:
        return PreparedData.load, (self.directory,)

    def _check_sizes(self) -> None:
        """Raise UserError where a mapped file was cut since it was opened: to touch what is missing
        ends the process (SIGBUS)."""
        for descriptor, path, size in self._files:
            if (now := os.fstat(descriptor).st_size) < size:
                raise UserError(
                    f"{path} was cut from {size} to {now} bytes while it was read: {REMEDY}"
                )

    def row(self, index: int) -> Sample:
        """Conversation `index`.

        Raises:
            IndexError: outside [0, len).
            UserError: its tokens, its mask or its weights are not those that were written.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        self._check_sizes()
        number = bisect.bisect_right(self._starts, index) - 1
        batch, place = self._batches[number], index - self._starts[number]
        name = batch.column("sample_id")[place].as_py()
        ids = batch.column("input_ids")[place].values.to_numpy()
        # Arrow stores bits, which are copied
        mask = batch.column("loss_mask")[place].values.to_numpy(zero_copy_only=False)
        whole, weights = sample_id(ids, mask) == name, None
        if self.card.weighted:
            weights = batch.column("token_weights")[place].values.to_numpy()
            whole &= weights_check(weights) == batch.column("weights_check")[place].as_py()
        if not whole:  # microseconds, and a flipped bit never trains anything
            raise UserError(f"conversation {index} of {self.directory} is damaged: {REMEDY}")
        return Sample(name, ids, mask, weights)


def _close(files: list[tuple[int, Path, int]]) -> None:
    for descriptor, *_ in files:
        os.close(descriptor)


def _read_table(directory: Path, card: DataCard) -> pa.Table:
    """The rows of all Arrow files, memory-mapped, with the columns of SCHEMA."""
    tables = []
    for name, size in card.files.items():
        path = inside(directory, name)
        on_disk = path.stat().st_size if path.is_file() else None
        if on_disk != size:
            state = "is missing" if on_disk is None else f"has {on_disk} bytes instead of {size}"
            raise UserError(f"{path} {state}: {REMEDY}")
        try:
            table = pa.ipc.open_stream(pa.memory_map(str(path))).read_all()
            table.validate()  # the buffers are as long as the rows need
            names = SCHEMA.names if card.weighted else UNWEIGHTED
            tables.append(
                table.select(names).cast(pa.schema([SCHEMA.field(name) for name in names]))
            )
        except (pa.ArrowException, OSError, ValueError, KeyError) as error:
            raise UserError(f"{path} cannot be read ({error}): {REMEDY}") from error
    if not tables:
        raise UserError(f"{directory / CARD_FILE} names no Arrow file: {REMEDY}")
    return pa.concat_tables(tables)


def _list_lengths(column: pa.ChunkedArray) -> np.ndarray:
    """[rows] number of values of every list; reads the offsets only."""
    parts = [np.diff(chunk.offsets.to_numpy()) for chunk in column.chunks]
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)


def _text_offsets(chunk: pa.Array) -> np.ndarray:
    """[rows + 1] where each text of a string column's chunk begins."""
    return np.frombuffer(chunk.buffers()[1], np.int32)[chunk.offset : chunk.offset + len(chunk) + 1]


def _text_bytes(chunk: pa.Array) -> pa.Buffer:
    """The texts of a string column's chunk as one piece, without copying."""
    offsets = _text_offsets(chunk)
    return chunk.buffers()[2].slice(int(offsets[0]), int(offsets[-1] - offsets[0]))
