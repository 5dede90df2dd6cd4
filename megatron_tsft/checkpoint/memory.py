"""Large buffers that go back to the system the moment they are freed; malloc keeps and fragments them (1 GB of 32 MB
boxes that one thread made and another freed)."""

import math
import mmap

import torch

SMALL = 2**20  # bytes; below it malloc


def zeros(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Like `torch.zeros` on CPU; the memory lives as long as the tensor."""
    count = math.prod(shape)
    if count * dtype.itemsize < SMALL:
        return torch.zeros(shape, dtype=dtype)
    return torch.frombuffer(mmap.mmap(-1, count * dtype.itemsize), dtype=dtype).view(shape)
