"""A few large buffers, used in turn: fresh memory for each box would cost more than the copy."""

import itertools
import math
import mmap

import torch

PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
COUNT = 3  # one that is made, one that is used, one that was just handed over (see ahead.py)


class Ring:
    """Tensors whose memory is taken over by the third one after them."""

    def __init__(self) -> None:
        self._buffers: list[mmap.mmap | None] = [None] * COUNT
        self._turns = itertools.cycle(range(COUNT))

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A contiguous CPU tensor that owns exactly its bytes; what is in it is undefined."""
        turn, count = next(self._turns), math.prod(shape)
        buffer = self._buffers[turn]
        if buffer is None or len(buffer) < count * dtype.itemsize:
            buffer = self._buffers[turn] = mmap.mmap(-1, count * dtype.itemsize, flags=PRIVATE)
        return torch.frombuffer(buffer, dtype=dtype, count=count).view(shape)
