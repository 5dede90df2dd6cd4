"""The CPU device layer: Megatron's real loop under gloo without a GPU, installed before it."""

from megatron_tsft.cpu.install import install

__all__ = ["install"]
