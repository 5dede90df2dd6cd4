"""Llama 2, 3, 3.1, 3.2, 3.3, SmolLM2 and whatever else says LlamaForCausalLM."""

from typing import Any

from megatron_tsft.checkpoint import rows
from megatron_tsft.checkpoint.architecture import decoder_arguments, refuse
from megatron_tsft.checkpoint.mapping import Family


def arguments(config: Any) -> dict[str, Any]:
    """LlamaConfig -> Megatron arguments."""
    refuse(
        config,
        "attention_bias",
        (None, False),
        "Llama then also has a bias on the output projection, which Megatron cannot match",
    )
    return decoder_arguments(config)


FAMILY = Family(
    name="llama",
    architectures=("LlamaForCausalLM",),
    models="Llama 2, 3, 3.1, 3.2, 3.3, SmolLM2 and others of that shape",
    arguments=arguments,
    rows=rows.decoder(rows.SELF_ATTENTION, rows.DENSE_MLP),
    extra_states=rows.DENSE_STATES,
)
