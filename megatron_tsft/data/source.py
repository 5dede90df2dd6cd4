"""The input of the preparation, in blocks: a JSONL file or a saved Hugging Face data set."""

import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_tsft.data.turns import Refusal
from megatron_tsft.errors import UserError

BLOCK_ROWS = 64  # what a worker gets at once


@dataclass(frozen=True)
class Block:
    """Some rows of the input: (number from 1, undecoded line or row). done: how much of the input
    was read by then."""

    rows: list[tuple[int, bytes | dict[str, Any]]]
    done: int


@dataclass(frozen=True)
class JsonLines:
    """A JSONL file, streamed; blank lines are passed over."""

    path: Path
    unit: str = "B"
    noun: str = "line"

    @property
    def total(self) -> int:
        return self.path.stat().st_size

    def blocks(self) -> Iterator[Block]:
        """Raises UserError where a .gz file is damaged."""
        rows: list[tuple[int, bytes | dict[str, Any]]] = []
        with self.path.open("rb") as file:
            lines = gzip.GzipFile(fileobj=file) if self.path.suffix == ".gz" else file
            try:
                for number, line in enumerate(lines, start=1):
                    if line.strip():
                        rows.append((number, line))
                    if len(rows) == BLOCK_ROWS:
                        yield Block(rows, file.tell())
                        rows = []
            except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                raise UserError(
                    f"{self.path} cannot be unpacked ({error}): copy or compress it again"
                ) from error
            yield Block(rows, file.tell())


@dataclass(frozen=True)
class SavedDataset:
    """A folder that `Dataset.save_to_disk` wrote, with the columns that a JSONL row has as keys."""

    path: Path
    unit: str = " rows"
    noun: str = "row"

    @property
    def total(self) -> int:
        return len(self._open())

    def _open(self) -> Any:
        from datasets import Dataset

        try:
            # rows as Python objects, whatever format the data set was saved with
            return Dataset.load_from_disk(str(self.path)).with_format(None)
        except (OSError, ValueError, KeyError) as error:
            raise UserError(
                f"{self.path} cannot be read as a Hugging Face data set: {error}"
            ) from error

    def blocks(self) -> Iterator[Block]:
        data = self._open()
        for start in range(0, len(data), BLOCK_ROWS):
            columns = data[start : start + BLOCK_ROWS]
            rows = [
                dict(zip(columns, values, strict=True))
                for values in zip(*columns.values(), strict=True)
            ]
            yield Block(list(enumerate(rows, start + 1)), start + len(rows))


def open_source(path: Path | str) -> JsonLines | SavedDataset:
    """The input at `path`.

    Raises:
        UserError: it is missing, or a folder of something else.
    """
    path = Path(path)
    if path.is_file():
        return JsonLines(path)
    if not path.is_dir():
        raise UserError(
            f"{path} does not exist: name a JSONL file or a folder that Dataset.save_to_disk wrote"
        )
    if (path / "dataset_dict.json").is_file():
        splits = ", ".join(
            sorted(folder.name for folder in path.iterdir() if (folder / "state.json").is_file())
        )
        raise UserError(f"{path} holds several splits: name the folder of one of them ({splits})")
    if not (path / "state.json").is_file():
        raise UserError(
            f"{path} is no data set: name a JSONL file or a folder that Dataset.save_to_disk wrote"
        )
    return SavedDataset(path)


def decode(row: bytes | dict[str, Any]) -> dict[str, Any]:
    """The object of a line.

    Raises:
        Refusal: not JSON, or not an object.
    """
    if isinstance(row, dict):
        return row
    try:
        value = json.loads(row)
    except (ValueError, RecursionError) as error:
        raise Refusal("bad JSON", str(error)) from error
    if not isinstance(value, dict):
        raise Refusal("not a JSON object")
    return value
