"""Qwen2 and Qwen2.5: biases on query, key and value."""

from typing import Any

from megatron_tsft.checkpoint import rows
from megatron_tsft.checkpoint.architecture import decoder_arguments
from megatron_tsft.checkpoint.mapping import Family


def arguments(config: Any) -> dict[str, Any]:
    """Qwen2Config -> Megatron arguments."""
    return decoder_arguments(config) | {"add_qkv_bias": True}


FAMILY = Family(
    name="qwen2",
    architectures=("Qwen2ForCausalLM",),
    models="Qwen2, Qwen2.5",
    arguments=arguments,
    rows=rows.decoder(rows.SELF_ATTENTION, rows.QKV_BIAS, rows.DENSE_MLP),
    extra_states=rows.DENSE_STATES,
)
