"""The CPU device layer: Megatron's real loop under gloo on a machine without a GPU. `install()`
before megatron."""

from megatron_tsft.cpu.install import install

__all__ = ["install"]
