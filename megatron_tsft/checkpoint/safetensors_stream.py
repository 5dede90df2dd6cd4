"""Writing one safetensors file tensor by tensor: the header is known beforehand, so nothing is held
in memory.

Format: https://github.com/huggingface/safetensors#format (8-byte little-endian header length, JSON
header padded with spaces to a multiple of 8, then the tensors' bytes in the header's order without
gaps).
"""

import json
import struct
from collections.abc import Mapping
from pathlib import Path

import torch

from megatron_tsft.checkpoint.hf_folder import DTYPES

NAMES = {kind: name for name, kind in DTYPES.items()}


class SafetensorsStream:
    """A context manager; `write` gets every announced tensor in the announced order, each whole or
    row by row."""

    def __init__(
        self, path: Path, tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]]
    ) -> None:
        """tensors: name -> (shape, dtype), in the order of writing."""
        self.path, self.tensors = path, dict(tensors)
        self._left = {name: torch.Size(shape).numel() for name, (shape, _) in self.tensors.items()}

    def __enter__(self) -> "SafetensorsStream":
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, (shape, dtype) in self.tensors.items():
            start, end = end, end + torch.Size(shape).numel() * dtype.itemsize
            header[name] = {
                "dtype": NAMES[dtype],
                "shape": list(shape),
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
        shape, dtype = self.tensors.get(name, ((), None))
        if (
            name != expected
            or rows.dtype != dtype
            or rows.shape[1:] != shape[1:]
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
