"""Megatron's `torch_dist` format in a stream: written box by box from a plan, read box by box from any sharding.

torch's checkpoint writer asks its planner for the data of one item at a time, just before it writes it
(torch/distributed/checkpoint/filesystem.py, `_SerialCpuLoader`), so a planner that makes a box only then needs no
model in memory. Only public names of torch.distributed.checkpoint are used; Megatron is not imported.
"""

import contextlib
import io
import itertools
import json
import math
import mmap
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner, create_default_global_save_plan
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.state_dict_saver import save

from megatron_tsft.checkpoint.ahead import ahead
from megatron_tsft.checkpoint.card import ModelCard
from megatron_tsft.checkpoint.folder import read_metadata
from megatron_tsft.checkpoint.memory import Ring
from megatron_tsft.errors import UserError

Shape = tuple[int, ...]
COMMON_STATE_KEY = "common_state/shard_0_1"  # where Megatron 0.19 keeps what older versions wrote to common.pt
BACKEND = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}  # Megatron's metadata.json


@dataclass(frozen=True)
class Box:
    """A part of one global tensor and how to make it: `fill` writes every number of a CPU tensor of shape `sizes`."""

    key: str
    global_shape: Shape
    offsets: Shape
    sizes: Shape
    dtype: torch.dtype
    fill: Callable[[torch.Tensor], None]


def common_state(card: ModelCard) -> dict[str, Any]:
    """What Megatron's own load path reads next to the weights; as a release checkpoint it starts at iteration 0."""
    parallel = dict.fromkeys(("tensor_model_parallel_size", "pipeline_model_parallel_size"), 1)
    arguments = card.megatron_arguments | parallel
    arguments |= {
        "add_position_embedding": True,
        "make_vocab_size_divisible_by": card.make_vocab_size_divisible_by,
        "padded_vocab_size": card.padded_vocab_size,
        "vocab_size": card.vocab_size,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "consumed_train_samples": 0,
        "consumed_valid_samples": 0,
        "skipped_train_samples": 0,
        "ckpt_format": "torch_dist",
        "no_save_optim": True,
        "no_save_rng": True,
    }
    return {
        "args": Namespace(**arguments),
        "checkpoint_version": 3.0,
        "iteration": 0,
        "content_metadata": {"singleton_local_shards": False, "chained_optim_avoid_prefix": True},
    }


class _StreamingPlanner(DefaultSavePlanner):
    """A save plan made of boxes and small objects; boxes are filled in a ring of buffers, one ahead of the writing."""

    def __init__(self, boxes: list[Box], objects: Mapping[str, Any]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._boxes, self._objects = boxes, objects
        self._made = ahead(self._make(Ring()))

    def _make(self, ring: Ring) -> Iterator[tuple[Box, torch.Tensor]]:
        for box in self._boxes:
            tensor = ring.take(box.sizes, box.dtype)
            box.fill(tensor)
            yield box, tensor

    def create_local_plan(self) -> SavePlan:
        items = [
            WriteItem(
                index=MetadataIndex(box.key, torch.Size(box.offsets)),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=ChunkStorageMetadata(torch.Size(box.offsets), torch.Size(box.sizes)),
                    properties=TensorProperties(dtype=box.dtype),
                    size=torch.Size(box.global_shape),
                ),
            )
            for box in self._boxes
        ]
        items += [WriteItem(index=MetadataIndex(key), type=WriteItemType.BYTE_IO) for key in self._objects]
        self.plan = SavePlan(items)
        return self.plan

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """Without torch's test for overlaps, which compares each pair of a thousand experts' boxes."""
        self.global_plan, self.metadata = create_default_global_save_plan(all_plans)
        return self.global_plan, self.metadata

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        if write_item.type == WriteItemType.BYTE_IO:
            data = io.BytesIO()
            torch.save([self._objects[write_item.index.fqn]], data)  # Megatron stores a list of one object
            return data
        box, tensor = next(self._made)
        place = (write_item.index.fqn, tuple(write_item.index.offset or ()))
        assert place == (box.key, box.offsets), f"torch asks for {place}, not in the plan's order"
        return tensor

    def close(self) -> None:
        """End the thread that makes boxes."""
        self._made.close()  # pyright: ignore[reportAttributeAccessIssue]


def write_checkpoint(directory: Path, boxes: list[Box], objects: Mapping[str, Any]) -> None:
    """Write one torch_dist checkpoint folder as `megatron.core.dist_checkpointing.save` lays it out.

    boxes: cover every tensor exactly once; filled in this order, one ahead of the writing. objects: unique key ->
    picklable object.

    Raises:
        OSError: the disk is full, or whatever else the disk or a box's `fill` raises.
    """
    directory.mkdir(parents=True, exist_ok=True)
    # no copy-ahead: on a machine with a GPU torch would otherwise load boxes ahead through CUDA streams
    writer = FileSystemWriter(str(directory), single_file_per_rank=True, thread_count=1, per_thread_copy_ahead=0)
    with warnings.catch_warnings(), contextlib.closing(_StreamingPlanner(boxes, objects)) as planner:
        warnings.simplefilter("ignore")  # "torch.distributed is uninitialized": intended
        try:
            with _without_checksums():
                save({}, storage_writer=writer, planner=planner, no_dist=True)
        except CheckpointException as error:  # the tracebacks of all ranks in one text, and no Exception
            cause, _ = next(iter(error.failures.values()))
            raise _origin(cause) from None
    (directory / "metadata.json").write_text(json.dumps(BACKEND))


@contextlib.contextmanager
def _without_checksums() -> Iterator[None]:
    """torch.load never compares the CRC32 that torch.save would spend a third of its time on."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


def _origin(error: BaseException) -> BaseException:
    """The OSError or Ctrl-C behind an exception, if there is one, where torch.save says "unexpected pos"."""
    link: BaseException | None = error
    while link is not None and not isinstance(link, OSError | KeyboardInterrupt):
        link = link.__cause__ or link.__context__
    return link or error


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
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)[: max(0, self._length - self._at)]
        self._file.seek(self._start + self._at)
        count = self._file.readinto(view) or 0
        self._at += count
        return count


class CheckpointReader:
    """Reads parts of a checkpoint that was saved with any tensor, pipeline or data parallel layout, in one process.

    The files are memory-mapped: reading makes no anonymous memory beyond the box that is returned.
    """

    def __init__(self, checkpoint: Path) -> None:
        """Raises UserError where the folder is no complete torch_dist checkpoint."""
        self.metadata: Metadata = read_metadata(checkpoint)
        self._checkpoint = checkpoint
        self._places: dict[str, tuple[int, dict[Shape, list[ChunkStorageMetadata]]]] = {}
        self._files: dict[str, mmap.mmap] = {}
        self._mapped: dict[MetadataIndex, torch.Tensor] = {}

    def tensor(self, key: str) -> TensorStorageMetadata:
        """Size, dtype and chunks of one tensor."""
        value = self.metadata.state_dict_metadata[key]
        assert isinstance(value, TensorStorageMetadata), key
        return value

    def read(self, key: str, offsets: Shape, sizes: Shape, out: torch.Tensor | None = None) -> torch.Tensor:
        """The box [offsets, offsets + sizes) of a global tensor, into `out` where given, in the dtype that is stored.

        Reads only the chunks that the box touches. Raises UserError where the checkpoint lacks a part of it.
        """
        leading, places = self._index(key)
        target = torch.empty(sizes, dtype=self.tensor(key).properties.dtype) if out is None else out
        covered = 0
        for index in itertools.product(*(range(o, o + n) for o, n in zip(offsets[:leading], sizes, strict=False))):
            for chunk in places.get(index, []):
                low = [max(a, b) for a, b in zip(offsets, chunk.offsets, strict=True)]
                high = [
                    min(a + n, b + m) for a, n, b, m in zip(offsets, sizes, chunk.offsets, chunk.sizes, strict=True)
                ]
                if all(a < b for a, b in zip(low, high, strict=True)):
                    there = [(a - o, b - o) for a, b, o in zip(low, high, chunk.offsets, strict=True)]
                    here = [(a - o, b - o) for a, b, o in zip(low, high, offsets, strict=True)]
                    whole = self._chunk(MetadataIndex(key, chunk.offsets), tuple(chunk.sizes), target.itemsize)
                    _bytes_of(target, here).copy_(_narrow(whole, there, target.itemsize))
                    covered += math.prod(b - a for a, b in here)
        if covered != target.numel():
            raise UserError(
                f"{self._checkpoint}: {key} has {covered} of the {target.numel()} numbers from {list(offsets)} to"
                f" {[o + n for o, n in zip(offsets, sizes, strict=True)]}: the checkpoint is damaged, use another one"
            )
        return target

    def _index(self, key: str) -> tuple[int, dict[Shape, list[ChunkStorageMetadata]]]:
        """The number of leading dimensions in which every chunk is one wide (layers, experts), and the chunks by their
        index there: a model of many experts has thousands of chunks in one key."""
        if key not in self._places:
            chunks, leading = self.tensor(key).chunks, 0
            while leading < len(self.tensor(key).size) - 1 and all(chunk.sizes[leading] == 1 for chunk in chunks):
                leading += 1
            by_index: dict[Shape, list[ChunkStorageMetadata]] = {}
            for chunk in chunks:
                by_index.setdefault(tuple(chunk.offsets[:leading]), []).append(chunk)
            self._places[key] = leading, by_index
        return self._places[key]

    def _chunk(self, index: MetadataIndex, shape: Shape, itemsize: int) -> torch.Tensor:
        """The bytes of one chunk, uint8 [..., columns * itemsize]: their place in the file need not be aligned."""
        if index not in self._mapped:
            info: Any = (self.metadata.storage_data or {})[index]
            path = self._checkpoint / info.relative_path
            with path.open("rb", buffering=0) as file:
                if info.relative_path not in self._files:
                    self._files[info.relative_path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
                window: Any = _Window(file, info.offset, info.length)
                described = torch.load(window, map_location="meta", weights_only=True)
                start = getattr(described.untyped_storage(), "_checkpoint_offset", None)
                if start is None or not described.is_contiguous() or tuple(described.shape) != shape:
                    window.seek(0)
                    whole = torch.load(window, map_location="cpu", weights_only=True)
                    return _as_bytes(whole.contiguous().view(shape))
            start += info.offset + described.storage_offset() * itemsize
            count = described.numel() * itemsize
            flat = torch.frombuffer(self._files[info.relative_path], dtype=torch.uint8, count=count, offset=start)
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
