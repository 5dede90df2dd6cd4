"""Megatron's `torch_dist` format in a stream: written box by box from a plan, read box by box from any sharding.

torch's checkpoint writer asks its planner for the data of one item at a time, just before it writes it
(torch/distributed/checkpoint/filesystem.py, `_SerialCpuLoader`), so a planner that makes a box only then needs no
model in memory. Only public names of torch.distributed.checkpoint are used; Megatron is not imported.
"""

import io
import json
import warnings
from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.state_dict_saver import save

from megatron_tsft.checkpoint.card import ModelCard
from megatron_tsft.checkpoint.folder import read_metadata

Shape = tuple[int, ...]
COMMON_STATE_KEY = "common_state/shard_0_1"  # where Megatron 0.19 keeps what older versions wrote to common.pt
BACKEND = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}  # Megatron's metadata.json


@dataclass(frozen=True)
class Box:
    """A part of one global tensor and how to make it: `make()` returns a CPU tensor of shape `sizes` and of `dtype`."""

    key: str
    global_shape: Shape
    offsets: Shape
    sizes: Shape
    dtype: torch.dtype
    make: Callable[[], torch.Tensor]


def common_state(card: ModelCard) -> dict[str, Any]:
    """What Megatron's own load path reads next to the weights; as a release checkpoint it starts at iteration 0."""
    parallel = dict.fromkeys(("tensor_model_parallel_size", "pipeline_model_parallel_size"), 1)
    arguments = card.megatron_arguments | parallel
    arguments |= {
        "add_position_embedding": True,
        "make_vocab_size_divisible_by": card.make_vocab_size_divisible_by,
        "padded_vocab_size": card.padded_vocab_size,
        "vocab_size": card.vocab_size,
        "rope_scaling_factor": card.rope_scaling_factor,
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
    """A save plan made of boxes and small objects; holds one box in memory at a time."""

    def __init__(self, boxes: list[Box], objects: Mapping[str, Any]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._boxes = {(box.key, box.offsets): box for box in boxes}
        self._objects = objects
        self._last: torch.Tensor | None = None

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
            for box in self._boxes.values()
        ]
        items += [WriteItem(index=MetadataIndex(key), type=WriteItemType.BYTE_IO) for key in self._objects]
        self.plan = SavePlan(items)
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        if write_item.type == WriteItemType.BYTE_IO:
            data = io.BytesIO()
            torch.save([self._objects[write_item.index.fqn]], data)  # Megatron stores a list of one object
            return data
        if self._last is not None:  # torch's writer keeps the last tensor of every key until the file ends
            self._last.untyped_storage().resize_(0)
        assert write_item.index.offset is not None
        self._last = self._boxes[write_item.index.fqn, tuple(write_item.index.offset)].make()
        return self._last


def write_checkpoint(directory: Path, boxes: list[Box], objects: Mapping[str, Any]) -> None:
    """Write one torch_dist checkpoint folder as `megatron.core.dist_checkpointing.save` lays it out.

    boxes: cover every tensor exactly once; made in this order, one at a time. objects: unique key -> picklable object.

    Raises:
        OSError: the disk is full, or whatever else the disk or a box's `make` raises.
    """
    directory.mkdir(parents=True, exist_ok=True)
    # no copy-ahead: on a machine with a GPU torch would otherwise load boxes ahead through CUDA streams
    writer = FileSystemWriter(str(directory), single_file_per_rank=True, thread_count=1, per_thread_copy_ahead=0)
    with warnings.catch_warnings():  # "torch.distributed is uninitialized": intended
        warnings.simplefilter("ignore")
        try:
            save({}, storage_writer=writer, planner=_StreamingPlanner(boxes, objects), no_dist=True)
        except CheckpointException as error:  # the tracebacks of all ranks in one text, and no Exception
            cause, _ = next(iter(error.failures.values()))
            raise _origin(cause) from None
    (directory / "metadata.json").write_text(json.dumps(BACKEND))


def _origin(error: BaseException) -> BaseException:
    """The OSError behind an exception, if there is one: torch.save says "unexpected pos" where the disk is full."""
    link: BaseException | None = error
    while link is not None and not isinstance(link, OSError):
        link = link.__cause__ or link.__context__
    return link or error


class _BoxPlanner(LoadPlanner):
    """Hands the reader the places in one target tensor."""

    def __init__(self, target: torch.Tensor) -> None:
        self.target = target

    def set_up_planner(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("the plan is made by CheckpointReader")

    create_local_plan = create_global_plan = finish_plan = load_bytes = set_up_planner  # pyright: ignore

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        place = self.target
        for dim, (offset, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            place = place.narrow(dim, offset, length)
        return place

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        """Nothing: the reader copied into the place itself."""


class CheckpointReader:
    """Reads parts of a checkpoint that was saved with any tensor, pipeline or data parallel layout, in one process."""

    def __init__(self, checkpoint: Path) -> None:
        """Raises UserError where the folder is no complete torch_dist checkpoint."""
        self.metadata: Metadata = read_metadata(checkpoint)
        self._reader = FileSystemReader(str(checkpoint))
        self._reader.set_up_storage_reader(self.metadata, is_coordinator=True)

    def tensor(self, key: str) -> TensorStorageMetadata:
        """Size, dtype and chunks of one tensor."""
        value = self.metadata.state_dict_metadata[key]
        assert isinstance(value, TensorStorageMetadata), key
        return value

    def read(self, key: str, offsets: Shape, sizes: Shape, dtype: torch.dtype) -> torch.Tensor:
        """The box [offsets, offsets + sizes) of a global tensor, cast to `dtype`; reads only the chunks it touches."""
        target = torch.empty(sizes, dtype=dtype)
        box = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
        items = create_read_items_for_chunk_list(key, self.tensor(key), [box])
        covered = sum(torch.Size(item.lengths).numel() for item in items)
        if covered != target.numel():
            raise RuntimeError(f"{key}: the checkpoint holds {covered} of {target.numel()} numbers of this box")
        self._reader.read_data(LoadPlan(items), _BoxPlanner(target)).wait()
        return target
