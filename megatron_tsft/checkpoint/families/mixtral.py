"""Mixtral 8x7B and 8x22B: a router and experts in every layer."""

from typing import Any

from megatron_tsft.checkpoint import rows
from megatron_tsft.checkpoint.architecture import decoder_arguments, expert_arguments, refuse
from megatron_tsft.checkpoint.mapping import Family


def arguments(config: Any) -> dict[str, Any]:
    """MixtralConfig -> Megatron arguments."""
    refuse(
        config,
        "router_jitter_noise",
        (None, 0, 0.0),
        "noise on the router's input is not supported",
    )
    experts = expert_arguments(config, "num_local_experts", "intermediate_size", renormalised=True)
    return decoder_arguments(config) | experts


FAMILY = Family(
    name="mixtral",
    architectures=("MixtralForCausalLM",),
    models="Mixtral 8x7B, 8x22B",
    arguments=arguments,
    rows=rows.decoder(rows.SELF_ATTENTION, rows.expert_mlp("block_sparse_moe", "w1", "w3", "w2")),
    extra_states=rows.EXPERT_STATES,
)
