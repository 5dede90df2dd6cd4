"""Writing Megatron's `torch_dist` format in a stream, box by box from a plan; torch_dist_reader.py
reads it.

torch's checkpoint writer asks its planner for the data of one item at a time, just before it writes
it (torch/distributed/checkpoint/filesystem.py, `_SerialCpuLoader`), so a planner that makes a box
only then needs no model in memory. Only public names of torch.distributed.checkpoint are used;
Megatron is not imported.
"""

import contextlib
import io
import json
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import (
    DefaultSavePlanner,
    create_default_global_save_plan,
)
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.state_dict_saver import save

from megatron_tsft.checkpoint.ahead import ahead
from megatron_tsft.checkpoint.card import ModelCard
from megatron_tsft.checkpoint.mapping import Shape
from megatron_tsft.checkpoint.memory import Ring

COMMON_STATE_KEY = (
    "common_state/shard_0_1"  # where Megatron 0.19 keeps what older versions wrote to common.pt
)
BACKEND = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
}  # Megatron's metadata.json


@dataclass(frozen=True)
class Box:
    """A part of a global tensor; `fill` writes every number of a CPU tensor of shape `sizes`."""

    key: str
    global_shape: Shape
    offsets: Shape
    sizes: Shape
    dtype: torch.dtype
    fill: Callable[[torch.Tensor], None]


def common_state(card: ModelCard) -> dict[str, Any]:
    """What Megatron's load path reads next to the weights; a release starts at iteration 0."""
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
    """A save plan of boxes and small objects; a ring of buffers is filled one box ahead."""

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
        items += [
            WriteItem(index=MetadataIndex(key), type=WriteItemType.BYTE_IO) for key in self._objects
        ]
        self.plan = SavePlan(items)
        return self.plan

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """Without torch's test for overlaps, which compares each pair of boxes."""
        self.global_plan, self.metadata = create_default_global_save_plan(all_plans)
        return self.global_plan, self.metadata

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        if write_item.type == WriteItemType.BYTE_IO:
            data = io.BytesIO()
            torch.save(
                [self._objects[write_item.index.fqn]], data
            )  # Megatron stores a list of one object
            return data
        box, tensor = next(self._made)
        place = (write_item.index.fqn, tuple(write_item.index.offset or ()))
        assert place == (box.key, box.offsets), f"torch asks for {place}, not in the plan's order"
        return tensor

    def close(self) -> None:
        """End the thread that makes boxes."""
        self._made.close()  # pyright: ignore[reportAttributeAccessIssue]


def write_checkpoint(directory: Path, boxes: list[Box], objects: Mapping[str, Any]) -> None:
    """Write one torch_dist checkpoint folder as `megatron.core.dist_checkpointing.save` lays it
    out.

    boxes: cover every tensor exactly once; filled in this order, one ahead of the writing. objects:
    unique key -> picklable object.

    Raises:
        OSError: the disk is full, or whatever else the disk or a box's `fill` raises.
    """
    directory.mkdir(parents=True, exist_ok=True)
    # no copy-ahead: on a machine with a GPU torch would
    # otherwise load boxes ahead through CUDA streams
    writer = FileSystemWriter(
        str(directory), single_file_per_rank=True, thread_count=1, per_thread_copy_ahead=0
    )
    with (
        warnings.catch_warnings(),
        contextlib.closing(_StreamingPlanner(boxes, objects)) as planner,
    ):
        warnings.simplefilter("ignore")  # "torch.distributed is uninitialized": intended
        try:
            with _without_checksums():
                save({}, storage_writer=writer, planner=planner, no_dist=True)
        except (
            CheckpointException
        ) as error:  # the tracebacks of all ranks in one text, and no Exception
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
    """The OSError or Ctrl-C behind an exception: torch.save itself says "unexpected pos"."""
    link: BaseException | None = error
    while link is not None and not isinstance(link, OSError | KeyboardInterrupt):
        link = link.__cause__ or link.__context__
    return link or error
