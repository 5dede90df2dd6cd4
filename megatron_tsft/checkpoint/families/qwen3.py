"""Qwen3, dense: norms on query and key, a head size of its own."""

from typing import Any

from megatron_tsft.checkpoint import rows
from megatron_tsft.checkpoint.architecture import decoder_arguments, refuse
from megatron_tsft.checkpoint.mapping import Family


def arguments(config: Any) -> dict[str, Any]:
    """Qwen3Config -> Megatron arguments."""
    refuse(
        config,
        "attention_bias",
        (None, False),
        "Qwen3 then also has a bias on the output projection, which is not supported",
    )
    return decoder_arguments(config) | {"qk_layernorm": True}


FAMILY = Family(
    name="qwen3",
    architectures=("Qwen3ForCausalLM",),
    models="Qwen3, dense",
    arguments=arguments,
    rows=rows.decoder(rows.SELF_ATTENTION, rows.QK_NORMS, rows.DENSE_MLP),
    extra_states=(*rows.DENSE_STATES, *rows.QK_NORM_STATES),
)
