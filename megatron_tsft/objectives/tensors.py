"""Arithmetic that rows, objectives and the loss share."""

import torch
from torch import Tensor


def as_like(value: float | Tensor, like: Tensor) -> Tensor:
    """`value` as a tensor of `like`'s type and device; a number is added, not copied, for which the
    host would wait."""
    return (torch.zeros((), dtype=like.dtype, device=like.device) + value).to(like.dtype)


def log_expm1(x: Tensor) -> Tensor:
    """log(e^x - 1) for x >= 0 without overflow."""
    return x + torch.log(-torch.expm1(-x))
