"""Megatron's own loop: flags, checks, datasets, forward step, logging, and the entry point
`pretrain_gpt`."""
