"""Hugging Face <-> Megatron: a mapping table per family, a streaming converter, the model card."""
