"""Which implementation reads the vocabulary: torch anywhere, the Triton kernels on a GPU."""

import functools
import importlib.util
import os
from types import ModuleType

import torch
from torch import Tensor

from megatron_tsft.loss import token_chunks

BACKENDS = ("torch", "triton")
VARIABLE = "TSFT_BACKEND"


def why_not_triton(logits: Tensor) -> str | None:
    """Why the kernels cannot serve these logits, or None where they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if logits.dtype == torch.float64:
        return "logits are float64, the kernels compute in float32"
    if logits.device.type == "cpu" and not _interpreted():
        return (
            "logits are on the CPU; TRITON_INTERPRET=1, set before the start, runs the kernels"
            " there (slowly)"
        )
    if logits.device.type not in ("cpu", "cuda"):
        return f"logits are on {logits.device.type}"
    return None


def implementation(logits: Tensor) -> ModuleType:
    """The module with `local_statistics` and `write_gradient` for these logits.

    Raises:
        ValueError: TSFT_BACKEND names no implementation, or one that cannot serve these logits.
    """
    choice = os.environ.get(VARIABLE, "")
    if choice not in ("", *BACKENDS):
        raise ValueError(
            f"{VARIABLE}={choice!r}; valid: {', '.join(BACKENDS)}, or unset for the fastest that"
            " fits"
        )
    reason = why_not_triton(logits) if choice == "triton" or logits.is_cuda else None
    if choice == "triton" and reason:
        raise ValueError(f"{VARIABLE}=triton cannot be used: {reason}")
    if choice == "triton" or (logits.is_cuda and choice != "torch" and not reason):
        return _kernels()
    return token_chunks


@functools.cache
def _kernels() -> ModuleType:
    from megatron_tsft.loss.triton import launch  # imports triton, which takes a second

    return launch


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"
