"""Train: `python -m megatron_tsft.training.pretrain_gpt` by a shorter name."""

from megatron_tsft.training.pretrain_gpt import main

__all__ = ["main"]
