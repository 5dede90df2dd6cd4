"""The input of the preparation, in blocks: files of every kind that data sets come in, one after
the other."""

import gzip
import io
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa

from megatron_tsft.data.json_array import array_values
from megatron_tsft.data.turns import Refusal
from megatron_tsft.errors import UserError
from megatron_tsft.plain_json import check_characters, check_depth

BLOCK_ROWS = 64  # what a worker gets at once
UNPACKED = (".gz", ".zst")
# a file's ending without that of its compression
LINES, ARRAY, PARQUET, ARROW = (".jsonl", ".ndjson"), (".json",), (".parquet",), (".arrow",)
KNOWN = (*LINES, *ARRAY, *PARQUET, *ARROW)
KINDS = "a JSONL, JSON, Parquet or Arrow file, a folder of them, or a saved Hugging Face data set"


@dataclass(frozen=True)
class Block:
    """Some rows of the input.

    Attributes:
        rows: (place, undecoded line or row); a place is a number from 1, with the file's name where
            there are several.
        done: how much of the input was read by then.
    """

    rows: list[tuple[int | str, bytes | dict[str, Any]]]
    done: int


@dataclass(frozen=True)
class File:
    """One file, streamed. Its size counts in bytes, which rows of Parquet and Arrow share
    evenly."""

    path: Path

    @property
    def total(self) -> int:
        return self.path.stat().st_size

    def rows(self) -> Iterator[tuple[int, bytes | dict[str, Any], int]]:
        """(number from 1, line or row, bytes read); blank lines are passed over.

        Raises:
            UserError: the file is damaged or not what its name says.
        """
        kind = _suffixes(self.path)[0]
        try:
            if kind in PARQUET or kind in ARROW:
                yield from self._table(kind)
            elif kind in ARRAY and self._first_character() == b"[":
                with self.path.open("rb") as raw:
                    values = array_values(self._unpacked(raw).read)
                    for number, value in enumerate(values, 1):
                        yield number, _object(value), raw.tell()
            else:
                with self.path.open("rb") as raw:
                    for number, line in enumerate(self._unpacked(raw), 1):
                        if line.strip():
                            yield number, line, raw.tell()
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise UserError(
                f"{self.path} cannot be unpacked ({error}): copy or compress it again"
            ) from error
        except (ValueError, RecursionError, pa.ArrowException, OSError) as error:
            raise UserError(f"{self.path} cannot be read ({error}): copy it again") from error

    def _unpacked(self, file: BinaryIO) -> Any:
        """The lines and bytes of an open file."""
        packed = _suffixes(self.path)[1]
        if packed == ".gz":
            return gzip.GzipFile(fileobj=file)
        if packed == ".zst":
            return io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(file), "zstd"))  # pyright: ignore[reportArgumentType]
        return file

    def _first_character(self) -> bytes:
        with self.path.open("rb") as raw:
            return self._unpacked(raw).read(4096).strip()[:1]

    def _table(self, kind: str) -> Iterator[tuple[int, dict[str, Any], int]]:
        if kind in PARQUET:
            from pyarrow import parquet

            with parquet.ParquetFile(self.path) as file:
                count = file.metadata.num_rows
                yield from self._counted(file.iter_batches(BLOCK_ROWS), count)
            return
        with pa.memory_map(str(self.path)) as source:
            magic = source.read(6)
            source.seek(0)
            if magic == b"ARROW1":
                reader: Any = pa.ipc.open_file(source)
                batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
            else:
                batches = list(pa.ipc.open_stream(source))
            yield from self._counted(batches, sum(len(batch) for batch in batches))

    def _counted(self, batches: Any, count: int) -> Iterator[tuple[int, dict[str, Any], int]]:
        number = 0
        for batch in batches:
            for start in range(0, len(batch), BLOCK_ROWS):
                for row in batch.slice(start, BLOCK_ROWS).to_pylist():
                    number += 1
                    yield number, row, self.total * number // max(count, 1)


@dataclass(frozen=True)
class SavedDataset:
    """A folder that `Dataset.save_to_disk` wrote, with the columns that a JSONL row has as keys."""

    path: Path

    @property
    def total(self) -> int:
        return sum(file.stat().st_size for file in self.path.glob("*.arrow"))

    def rows(self) -> Iterator[tuple[int, dict[str, Any], int]]:
        """See File.rows."""
        from datasets import Dataset

        try:
            # rows as Python objects, whatever format the data set was saved with
            data = Dataset.load_from_disk(str(self.path)).with_format(None)
        except (OSError, ValueError, KeyError) as error:
            raise UserError(
                f"{self.path} cannot be read as a Hugging Face data set: {error}"
            ) from error
        total, count = self.total, len(data)
        for start in range(0, count, BLOCK_ROWS):
            columns = data[start : start + BLOCK_ROWS]
            for number, values in enumerate(zip(*columns.values(), strict=True), start + 1):
                yield number, dict(zip(columns, values, strict=True)), total * number // count


@dataclass(frozen=True)
class Source:
    """All inputs of a preparation, in order."""

    parts: list[File | SavedDataset]

    @property
    def total(self) -> int:
        """Bytes."""
        return sum(part.total for part in self.parts)

    @property
    def noun(self) -> str:
        """What a place names: "line" or "row"."""
        lines = isinstance(self.parts[0], File) and _suffixes(self.parts[0].path)[0] in LINES
        return "line" if lines else "row"

    def __str__(self) -> str:
        more = f" and {len(self.parts) - 1} more" if len(self.parts) > 1 else ""
        return f"{self.parts[0].path}{more}"

    def blocks(self) -> Iterator[Block]:
        """Raises UserError where a file cannot be read."""
        rows: list[tuple[int | str, bytes | dict[str, Any]]] = []
        done = before = 0
        for part in self.parts:
            for number, row, read in part.rows():
                place = number if len(self.parts) == 1 else f"{part.path.name}:{number}"
                rows.append((place, row))
                done = before + read
                if len(rows) == BLOCK_ROWS:
                    yield Block(rows, done)
                    rows = []
            before += part.total
        yield Block(rows, before)

    def first_rows(self) -> Iterator[dict[str, Any]]:
        """The rows that can be decoded, from the beginning."""
        for block in self.blocks():
            for _, row in block.rows:
                try:
                    yield decode(row)
                except Refusal:
                    continue


def open_source(paths: Path | str | Sequence[Path | str]) -> Source:
    """The inputs at `paths`; of a folder, all files of kinds that are known, by name.

    Raises:
        UserError: one is missing, or is or holds something else.
    """
    one = isinstance(paths, Path | str)
    parts = [part for path in ([paths] if one else paths) for part in _parts(Path(path))]
    if not parts:
        raise UserError("--input names nothing: give a file")
    return Source(parts)


def _parts(path: Path) -> list[File | SavedDataset]:
    if path.is_file():
        if _suffixes(path)[0] not in KNOWN:
            raise UserError(f"{path} ends in none of {', '.join(KNOWN)}: name {KINDS}")
        return [File(path)]
    if not path.is_dir():
        hub = str(path).count("/") == 1 and not str(path).startswith((".", "/"))
        fetch = (
            f"; for the hub's data set, first `hf download {path} --repo-type dataset --local-dir"
            f" {path.name}`"
            if hub
            else ""
        )
        raise UserError(f"{path} does not exist: name {KINDS}{fetch}")
    if (path / "state.json").is_file():
        return [SavedDataset(path)]
    splits = sorted(found.parent.name for found in path.glob("*/state.json"))
    if splits or (path / "dataset_dict.json").is_file():
        raise UserError(
            f"{path} holds several splits: name the folder of one of them ({', '.join(splits)})"
        )
    files = sorted(found for found in path.rglob("*") if _suffixes(found)[0] in KNOWN)
    # what describes a data set is no part of it
    files = [file for file in files if file.is_file() and file.name != "dataset_infos.json"]
    if not files:
        raise UserError(f"{path} has no file that ends in {', '.join(KNOWN)}: name {KINDS}")
    return [File(file) for file in files]


def _suffixes(path: Path) -> tuple[str, str]:
    """(of what is in it, of its compression) in small letters."""
    packed = path.suffix.lower() if path.suffix.lower() in UNPACKED else ""
    return Path(path.stem if packed else path.name).suffix.lower(), packed


def _object(value: Any) -> Any:
    """A row of a JSON array; what is no object that can be used is refused where rows are."""
    try:
        check_depth(value)
        check_characters(value)
        usable = isinstance(value, dict)
    except ValueError:
        usable = False
    return value if usable else json.dumps(value).encode()


def decode(row: bytes | dict[str, Any]) -> dict[str, Any]:
    """The object of a line.

    Raises:
        Refusal: not JSON, or not an object.
    """
    if isinstance(row, dict):
        return row
    try:
        value = json.loads(row)
        check_depth(value)
        if b"\\u" in row:  # half a character can only be written so
            check_characters(value)
    except (ValueError, RecursionError) as error:
        raise Refusal("bad JSON", str(error)) from error
    if not isinstance(value, dict):
        raise Refusal("not a JSON object")
    return value
