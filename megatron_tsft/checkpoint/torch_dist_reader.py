"""Reading Megatron's `torch_dist` format box by box, of any sharding, from memory-mapped files."""

import io
import itertools
import math
import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from megatron_tsft.checkpoint.folder import read_metadata
from megatron_tsft.checkpoint.mapping import Shape
from megatron_tsft.errors import DamagedError, UserError


class _Window(io.RawIOBase):
    """A part of a file as a file of its own."""

    def __init__(self, file: io.FileIO, start: int, length: int) -> None:
        super().__init__()
        self._file, self._start, self._length, self._at = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = (
            offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        )
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)[: max(0, self._length - self._at)]
        self._file.seek(self._start + self._at)
        count = self._file.readinto(view) or 0
        self._at += count
        return count


@dataclass(frozen=True)
class ChunkIndex:
    """The chunks of one key by their place: a model of many experts has thousands of them.

    Attributes:
        leading: the number of leading dimensions in which every chunk is one wide (layers,
            experts).
        chunks: index in these dimensions -> the chunks that lie there.
    """

    leading: int
    chunks: dict[Shape, list[ChunkStorageMetadata]]


class CheckpointReader:
    """Reads parts of a checkpoint that was saved with any tensor, pipeline or data parallel layout,
    in one process.

    The files are memory-mapped: reading makes no anonymous memory beyond the box that is returned.
    """

    def __init__(self, checkpoint: Path) -> None:
        """Raises UserError where the folder is no complete torch_dist checkpoint."""
        self.metadata: Metadata = read_metadata(checkpoint)
        self._checkpoint = checkpoint
        self._indices: dict[str, ChunkIndex] = {}
        self._files: dict[str, mmap.mmap] = {}
        self._mapped: dict[MetadataIndex, torch.Tensor] = {}
        # for chunks of which torch does not say where in a file they lie
        self._read: dict[MetadataIndex, torch.Tensor] = {}

    def tensor(self, key: str) -> TensorStorageMetadata:
        """Size, dtype and chunks of one tensor."""
        value = self.metadata.state_dict_metadata[key]
        assert isinstance(value, TensorStorageMetadata), key
        return value

    def read(
        self, key: str, offsets: Shape, sizes: Shape, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The box [offsets, offsets + sizes) of a global tensor, into `out` where given, in the
        dtype that is stored.

        Reads only the chunks that the box touches. Raises UserError where the checkpoint lacks a
        part of it.
        """
        places = self._index(key)
        target = torch.empty(sizes, dtype=self.tensor(key).properties.dtype) if out is None else out
        covered = 0
        for index in itertools.product(
            *(range(o, o + n) for o, n in zip(offsets[: places.leading], sizes, strict=False))
        ):
            for chunk in places.chunks.get(index, []):
                low = [max(a, b) for a, b in zip(offsets, chunk.offsets, strict=True)]
                high = [
                    min(a + n, b + m)
                    for a, n, b, m in zip(offsets, sizes, chunk.offsets, chunk.sizes, strict=True)
                ]
                if all(a < b for a, b in zip(low, high, strict=True)):
                    there = [
                        (a - o, b - o) for a, b, o in zip(low, high, chunk.offsets, strict=True)
                    ]
                    here = [(a - o, b - o) for a, b, o in zip(low, high, offsets, strict=True)]
                    whole = self._chunk(
                        MetadataIndex(key, chunk.offsets), tuple(chunk.sizes), target.itemsize
                    )
                    _bytes_of(target, here).copy_(_narrow(whole, there, target.itemsize))
                    covered += math.prod(b - a for a, b in here)
        if covered != target.numel():
            raise UserError(
                f"{self._checkpoint}: {key} has {covered} of the {target.numel()} numbers from"
                f" {list(offsets)} to {[o + n for o, n in zip(offsets, sizes, strict=True)]}: the"
                " checkpoint is damaged, use another one"
            )
        return target

    def _index(self, key: str) -> ChunkIndex:
        """Made once for each key."""
        if key not in self._indices:
            chunks, leading = self.tensor(key).chunks, 0
            while leading < len(self.tensor(key).size) - 1 and all(
                chunk.sizes[leading] == 1 for chunk in chunks
            ):
                leading += 1
            by_index: dict[Shape, list[ChunkStorageMetadata]] = {}
            for chunk in chunks:
                by_index.setdefault(tuple(chunk.offsets[:leading]), []).append(chunk)
            self._indices[key] = ChunkIndex(leading, by_index)
        return self._indices[key]

    def _chunk(self, index: MetadataIndex, shape: Shape, itemsize: int) -> torch.Tensor:
        """The bytes of one chunk, uint8 [..., columns * itemsize]; the file need not align them.

        Raises:
            DamagedError: there is no such tensor in the file.
        """
        if index in self._read:
            return self._read[index]
        if index not in self._mapped:
            try:
                return self._load(index, shape, itemsize)
            except Exception as error:  # a damaged file may raise almost anything
                text = " ".join(str(error).split())[:200]
                raise DamagedError(
                    f"{self._checkpoint}: {index.fqn} is damaged ({text}): use another checkpoint",
                    self._checkpoint,
                ) from error
        return self._mapped[index]

    def _load(self, index: MetadataIndex, shape: Shape, itemsize: int) -> torch.Tensor:
        """A chunk that was not asked for before."""
        info: Any = (self.metadata.storage_data or {})[index]
        path = self._checkpoint / info.relative_path
        with path.open("rb", buffering=0) as file:
            if info.relative_path not in self._files:
                self._files[info.relative_path] = mmap.mmap(
                    file.fileno(), 0, access=mmap.ACCESS_COPY
                )
            window: Any = _Window(file, info.offset, info.length)
            described = torch.load(window, map_location="meta", weights_only=True)
            start = getattr(described.untyped_storage(), "_checkpoint_offset", None)
            if start is None or not described.is_contiguous() or tuple(described.shape) != shape:
                window.seek(0)
                whole = torch.load(window, map_location="cpu", weights_only=True)
                self._read = {index: _as_bytes(whole.contiguous().view(shape))}  # the last alone
                return self._read[index]
        start += info.offset + described.storage_offset() * itemsize
        count = described.numel() * itemsize
        flat = torch.frombuffer(
            self._files[info.relative_path], dtype=torch.uint8, count=count, offset=start
        )
        self._mapped[index] = flat.view(*shape[:-1], -1)
        return self._mapped[index]


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor as uint8 [..., columns * itemsize]."""
    return tensor.view(-1).view(torch.uint8).view(*tensor.shape[:-1], -1)


def _narrow(whole: torch.Tensor, ranges: list[tuple[int, int]], itemsize: int) -> torch.Tensor:
    """The part of a tensor of bytes; `ranges` count numbers of `itemsize` bytes."""
    scaled = [*ranges[:-1], *((a * itemsize, b * itemsize) for a, b in ranges[-1:])]
    return whole[tuple(slice(a, b) for a, b in scaled)]


def _bytes_of(target: torch.Tensor, ranges: list[tuple[int, int]]) -> torch.Tensor:
    """The bytes of a part of a contiguous tensor, to be written."""
    return _narrow(_as_bytes(target), ranges, target.itemsize)
