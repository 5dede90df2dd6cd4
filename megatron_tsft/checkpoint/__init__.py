"""Hugging Face <-> Megatron: one mapping table per family, a streaming converter, the model
card."""
