"""What a checkpoint keeps as pickles, read by a list of classes, so that nothing in a folder runs.

A torch_dist checkpoint has two kinds: `.metadata`, which says where each tensor lies, and objects
among the data (Megatron's arguments, random states, Transformer Engine's extra states). Megatron
and torch read both without a list (torch/distributed/checkpoint/filesystem.py, read_metadata;
default_planner.py, load_bytes): so they are read here first, and what this list does not have is
refused by name.
"""

import argparse
import io
import pathlib
import pickle
import signal
import types
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch._utils import _rebuild_tensor_v2  # pyright: ignore[reportPrivateUsage]
from torch.distributed.checkpoint import filesystem, metadata, planner

from megatron_tsft.errors import DamagedError, UserError
from megatron_tsft.trust import trusted


class StandIn:
    """Takes the place of an object that is on the list and of no use here, such as Megatron's
    enumerations; it has no effect."""

    def __new__(cls, *args: Any, **kwargs: Any) -> "StandIn":
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...

    def __hash__(self) -> int:
        return id(self)


class Unlisted(pickle.UnpicklingError):
    """A pickle names something that is not on the list; `name` says what."""

    def __init__(self, name: str) -> None:
        super().__init__(f"it would make a {name}")
        self.name = name


def _load_bytes(data: bytes) -> Any:
    return load_object(io.BytesIO(data))


def _bytes_of_text(text: str, encoding: str) -> bytes:
    """How protocol 2, which torch.save writes, holds bytes."""
    if encoding != "latin1":
        raise Unlisted(f"encoding in {encoding}")
    return text.encode("latin1")


DTYPES = [name for name, value in vars(torch).items() if isinstance(value, torch.dtype)]
# what torch.distributed.checkpoint writes into .metadata
DESCRIPTION: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("pathlib", "PosixPath"): pathlib.PosixPath,  # a checkpoint's own name, which nobody opens
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    **{("torch", name): getattr(torch, name) for name in DTYPES},
    **{
        (module.__name__, name): getattr(module, name)
        for module, names in (
            (
                metadata,
                "BytesStorageMetadata ChunkStorageMetadata Metadata MetadataIndex StorageMeta"
                " TensorProperties TensorStorageMetadata _MEM_FORMAT_ENCODING",
            ),
            (filesystem, "_StorageInfo _StoragePrefix"),
            (
                planner,
                "BytesIOWriteData SavePlan TensorWriteData WriteItem WriteItemType",
            ),
        )
        for name in names.split()
        if hasattr(module, name)
    },
}
# what Megatron and Transformer Engine write among the data
OBJECTS: dict[tuple[str, str], Any] = {
    **DESCRIPTION,
    ("argparse", "Namespace"): argparse.Namespace,
    ("_io", "BytesIO"): io.BytesIO,
    ("builtins", "set"): set,
    ("builtins", "complex"): complex,
    ("builtins", "bytearray"): bytearray,
    ("_codecs", "encode"): _bytes_of_text,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor_v2,
    # what a tensor is when it was pickled without torch.save: read by this list, too
    ("torch.storage", "_load_from_bytes"): _load_bytes,
    ("megatron.core.safe_globals", "safe_load_from_bytes"): _load_bytes,
    ("signal", "Signals"): signal.Signals,
    **dict.fromkeys(
        [
            ("torch._utils", "_rebuild_parameter"),
            ("torch._tensor", "_rebuild_from_type_v2"),
            ("torch", "device"),
            *((f"numpy.{core}.multiarray", "_reconstruct") for core in ("core", "_core")),
            *((f"numpy.{core}.multiarray", "scalar") for core in ("core", "_core")),
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
        ],
        StandIn,
    ),
    **{
        (module, name): StandIn
        for module, names in {
            "megatron.core.enums": "ModelType Fp8Recipe Fp4Recipe",
            "megatron.core.transformer.enums": "ModelType LayerType AttnType AttnMaskType"
            " AttnBackend CudaGraphModule CudaGraphScope InferenceCudaGraphScope",
            "megatron.core.rerun_state_machine": "RerunDiagnostic RerunMode RerunState"
            " RerunValidationStatus",
            "megatron.core.inference.config": "PrefixCachingEvictionPolicy"
            " PrefixCachingCoordinatorPolicy KVCacheManagementMode CudaGraphSizingDistribution"
            " AsyncScheduleMode",
            "megatron.core.extensions.transformer_engine": "TEDelayedScaling",
            "transformer_engine.common.recipe": "DelayedScaling Float8CurrentScaling"
            " Float8BlockScaling MXFP8BlockScaling NVFP4BlockScaling Format _FormatHelper MMParams"
            " QParams",
        }.items()
        for name in names.split()
    },
}


class _Unpickler(pickle.Unpickler):
    """Builds what OBJECTS names and refuses the rest; where folders are trusted, the rest becomes
    stand-ins, because what Megatron makes of it is no concern here."""

    listed = OBJECTS

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        found = self.listed.get((module_name, global_name))
        if found is not None:
            return found
        if trusted():
            return StandIn
        raise Unlisted(f"{module_name}.{global_name}")


class _DescriptionUnpickler(_Unpickler):
    listed = DESCRIPTION


# what torch.load asks of a module to unpickle with
_PICKLE: Any = types.SimpleNamespace(
    __name__="pickle",
    Unpickler=_Unpickler,
    load=lambda file, **options: _Unpickler(file, **options).load(),
)


def load_description(path: Path) -> metadata.Metadata:
    """The `.metadata` of a checkpoint.

    Raises:
        UserError: it names a class that is not on the list.
        Exception: whatever a damaged pickle raises.
    """
    with path.open("rb") as file:
        try:
            found = _DescriptionUnpickler(file).load()
        except Unlisted as error:
            raise _refusal(path, error) from error
    if not isinstance(found, metadata.Metadata):
        raise ValueError(f"it holds a {type(found).__name__}")
    _check_description(found)
    return found


def _check_description(found: metadata.Metadata) -> None:
    """Raises ValueError or AttributeError: a part of it is of another type, as where a bit flipped;
    a pickle says nothing of types."""
    for key, kind in found.state_dict_metadata.items():
        right = isinstance(key, str)
        if isinstance(kind, metadata.TensorStorageMetadata):
            right &= _is_shape(kind.size) and isinstance(kind.properties.dtype, torch.dtype)
            right &= isinstance(kind.chunks, list) and all(
                _is_shape(part) and len(part) == len(kind.size)
                for chunk in kind.chunks
                for part in (chunk.offsets, chunk.sizes)
            )
        elif not isinstance(kind, metadata.BytesStorageMetadata):
            right = False
        if not right:
            raise ValueError(f"it describes {key!r:.80} as no tensor and no object")
    for index, place in (found.storage_data or {}).items():
        numbers = (place.offset, place.length)
        right = isinstance(index, metadata.MetadataIndex) and isinstance(index.fqn, str)
        right &= index.offset is None or _is_shape(index.offset)
        right &= isinstance(place.relative_path, str)
        if not right or not all(type(number) is int and number >= 0 for number in numbers):
            raise ValueError(f"it says no place of {index!r:.80}")


def _is_shape(value: Any) -> bool:
    return isinstance(value, tuple) and all(type(size) is int and size >= 0 for size in value)


def load_object(data: io.BytesIO) -> Any:
    """What torch.save wrote, with stand-ins for tensors and enumerations.

    Raises:
        Unlisted: it names something that is not on the list.
        Exception: whatever a damaged file raises.
    """
    data.seek(0)
    return torch.load(data, map_location="cpu", weights_only=False, pickle_module=_PICKLE)


def check_objects(checkpoint: Path, described: metadata.Metadata) -> None:
    """Read every object among a checkpoint's data, and what is nested in it, by the list.

    Raises:
        UserError: one names something that is not on the list, or is damaged.
    """
    if trusted():
        return
    objects: dict[str, list[tuple[int, int, str]]] = {}  # file -> offset, length, key
    for index, place in (described.storage_data or {}).items():
        # torch reads tensors by a list of its own
        kind = described.state_dict_metadata.get(index.fqn)
        if not isinstance(kind, metadata.TensorStorageMetadata):
            whole = (place.offset, place.length, index.fqn)
            objects.setdefault(place.relative_path, []).append(whole)
    for name, places in objects.items():
        path = checkpoint / name
        with path.open("rb") as file:
            for offset, length, key in sorted(places):
                file.seek(offset)
                try:
                    _check(io.BytesIO(file.read(length)), pickled_tensors="_extra_state" in key)
                except Unlisted as error:
                    raise _refusal(path, error, key) from error
                except Exception as error:  # a damaged pickle may raise almost anything
                    text = " ".join(str(error).split())[:200]
                    raise DamagedError(
                        f"{path}: {key} is damaged ({text}): use another checkpoint", checkpoint
                    ) from error


def _check(data: io.BytesIO, *, pickled_tensors: bool) -> None:
    """Read an object and what is nested in it; pickled_tensors: tensors of bytes are pickles, which
    Transformer Engine reads itself."""
    waiting: list[Any] = [load_object(data)]
    while waiting:
        value = waiting.pop()
        if isinstance(value, io.BytesIO) and value.getbuffer().nbytes:
            waiting.append(load_object(value))
        elif isinstance(value, torch.Tensor):
            if pickled_tensors and value.dtype == torch.uint8 and value.numel():
                waiting.append(_Unpickler(io.BytesIO(value.numpy().tobytes())).load())
        elif isinstance(value, dict):
            waiting += _values(value.values())
        elif isinstance(value, list | tuple | set):
            waiting += _values(value)


def _values(values: Iterable[Any]) -> list[Any]:
    """Of the values, those that may hold others."""
    holders = io.BytesIO | dict | list | tuple | set | torch.Tensor
    return [value for value in values if isinstance(value, holders)]


def _refusal(path: Path, error: Unlisted, key: str = "") -> UserError:
    where = f"{path}{f', {key}' if key else ''}"
    return UserError(
        f"{where} is a pickle that would call {error.name}, which no checkpoint of Megatron has"
        " need of: nothing was run; if you trust whoever wrote the folder, pass --trust (runs:"
        " --tsft-trust)"
    )
