"""The two collectives on whole tensors, by the name that the installed torch has for them.

The list forms would cost a copy kernel a rank over NCCL. torch 2.11 has `all_gather_into_tensor`
and `reduce_scatter_tensor`, 2.14 deprecates them for `..._single`.
"""

from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import Tensor


def all_gather(part: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[ranks, ...] from each rank's [...], in rank order."""
    part = part.contiguous()
    whole = part.new_empty(group.size(), *part.shape)
    gather = _first_of("all_gather_single", "all_gather_into_tensor")
    gather(whole.flatten(0, 1), part, group=group)
    return whole


def reduce_scatter(whole: Tensor, group: dist.ProcessGroup) -> Tensor:
    """This rank's [n, ...] of the sum over ranks of [ranks * n, ...]."""
    mine = whole.new_empty(len(whole) // group.size(), *whole.shape[1:])
    scatter = _first_of("reduce_scatter_single", "reduce_scatter_tensor")
    scatter(mine, whole.contiguous(), group=group)
    return mine


def _first_of(*names: str) -> Callable[..., Any]:
    """The first of these collectives that the installed torch has."""
    return next(getattr(dist, name) for name in names if hasattr(dist, name))
