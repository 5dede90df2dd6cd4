"""Writing one safetensors file tensor by tensor: the header is known beforehand, so nothing is held
in memory.

Format: https://github.com/huggingface/safetensors#format (8-byte little-endian header length, JSON
header padded with spaces to a multiple of 8, then the tensors' bytes in the header's order without
gaps).
"""

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_tsft.checkpoint.hf_folder import DTYPES

NAMES = {kind: name for name, kind in DTYPES.items()}


@dataclass(frozen=True)
class TensorSpec:
    """What a tensor will be that is written later."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numbers(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def bytes(self) -> int:
        return self.numbers * self.dtype.itemsize


class SafetensorsStream:
    """A context manager; `write` gets the announced tensors in order, whole or row by row."""

    def __init__(self, path: Path, tensors: Mapping[str, TensorSpec]) -> None:
        """`tensors` are announced by name, in the order of writing."""
        self.path, self.tensors = path, dict(tensors)
        self._left = {name: tensor.numbers for name, tensor in self.tensors.items()}

    def __enter__(self) -> "SafetensorsStream":
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, tensor in self.tensors.items():
            start, end = end, end + tensor.bytes
            header[name] = {
                "dtype": NAMES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [start, end],
            }
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self._file = self.path.open("wb")
        self._file.write(struct.pack("<Q", len(text)) + text)
        return self

    def write(self, name: str, rows: torch.Tensor) -> None:
        """Append the next rows of one tensor, which must have the announced columns and dtype."""
        expected = next(iter(self._left), None)
        if (
            name != expected
            or rows.dtype != self.tensors[name].dtype
            or rows.shape[1:] != self.tensors[name].shape[1:]
            or rows.numel() > self._left[name]
        ):
            raise RuntimeError(
                f"{self.path}: wrote {name} {tuple(rows.shape)} {rows.dtype}, announced {expected}"
            )
        self._file.write(rows.contiguous().view(torch.uint8).numpy())
        self._left[name] -= rows.numel()
        if not self._left[name]:
            del self._left[name]

    def __exit__(self, kind: object, *_: object) -> None:
        self._file.close()
        if kind is None and self._left:
            raise RuntimeError(
                f"{self.path}: {len(self._left)} announced tensors were never written"
            )
