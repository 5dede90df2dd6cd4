"""The arguments that a run's checkpoint was saved with, read without Megatron and without running
anything that the file names."""

import argparse
import io
import pickle
import types
from pathlib import Path
from typing import Any

import torch

from megatron_tsft.checkpoint.folder import read_metadata
from megatron_tsft.errors import UserError

COMMON = "common_state"  # Megatron's name for all that is no tensor
LEGACY_FILE = "common.pt"  # where older versions of Megatron keep it
# what numbers, texts, lists and tensors are made of;
# anything else becomes a stand-in without effect
READ = {
    ("argparse", "Namespace"): argparse.Namespace,
    ("_io", "BytesIO"): io.BytesIO,
    ("collections", "OrderedDict"): dict,
    ("builtins", "set"): set,
    ("builtins", "complex"): complex,
}


class StandIn:
    """Takes the place of an object whose class is not in READ, such as Megatron's enumerations."""

    def __new__(cls, *args: Any, **kwargs: Any) -> "StandIn":
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...

    def __call__(self, *args: Any, **kwargs: Any) -> "StandIn":
        return self

    def append(self, value: Any) -> None: ...

    def extend(self, values: Any) -> None: ...

    def __setitem__(self, key: Any, value: Any) -> None: ...

    def __hash__(self) -> int:
        return id(self)


class _Unpickler(pickle.Unpickler):
    """Builds what READ names and stand-ins for the rest."""

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        return READ.get((module_name, global_name), StandIn)


# what torch.load asks of a module to unpickle with
_PICKLE: Any = types.SimpleNamespace(
    __name__="pickle",
    Unpickler=_Unpickler,
    load=lambda file, **options: _Unpickler(file, **options).load(),
)


def saved_arguments(checkpoint: Path) -> dict[str, Any]:
    """Argparse destination -> value, of the run that saved this checkpoint.

    Raises:
        UserError: they are not there, or cannot be read.
    """
    try:
        common = _load(_bytes_of(checkpoint))
        while isinstance(common, list | io.BytesIO):  # a list of one, or bytes in bytes
            common = common[0] if isinstance(common, list) else _load(common)
        return dict(vars(common["args"]))
    except (
        KeyError,
        IndexError,
        TypeError,
        OSError,
        RuntimeError,
        pickle.UnpicklingError,
    ) as error:
        raise UserError(
            f"{checkpoint} does not say what arguments it was saved with ({error!r}): the copy is"
            " incomplete, use another checkpoint"
        ) from error


def _bytes_of(checkpoint: Path) -> io.BytesIO:
    """The file, or the part of one, that holds what is no tensor."""
    if (checkpoint / LEGACY_FILE).is_file():
        return io.BytesIO((checkpoint / LEGACY_FILE).read_bytes())
    storage: dict[Any, Any] = read_metadata(checkpoint).storage_data or {}
    place = next(info for index, info in storage.items() if index.fqn.split("/")[0] == COMMON)
    with (checkpoint / place.relative_path).open("rb") as file:
        file.seek(place.offset)
        return io.BytesIO(file.read(place.length))


def _load(data: io.BytesIO) -> Any:
    data.seek(0)
    return torch.load(data, map_location="cpu", weights_only=False, pickle_module=_PICKLE)
