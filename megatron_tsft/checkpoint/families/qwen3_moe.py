"""Qwen3 mixtures of experts: norms on query and key, a router and experts in every layer."""

from typing import Any

from megatron_tsft.checkpoint import rows
from megatron_tsft.checkpoint.architecture import (
    decoder_arguments,
    expert_arguments,
    refuse,
    value_of,
)
from megatron_tsft.checkpoint.mapping import Family


def arguments(config: Any) -> dict[str, Any]:
    """Qwen3MoeConfig -> Megatron arguments."""
    refuse(
        config,
        "attention_bias",
        (None, False),
        "Qwen3 then also has a bias on the output projection, which is not supported",
    )
    refuse(
        config, "decoder_sparse_step", (1,), "dense layers between sparse ones are not supported"
    )
    refuse(
        config, "mlp_only_layers", (None, []), "dense layers between sparse ones are not supported"
    )
    experts = expert_arguments(
        config,
        "num_experts",
        "moe_intermediate_size",
        renormalised=value_of(config, "norm_topk_prob", bool),
    )
    return decoder_arguments(config) | experts | {"qk_layernorm": True}


FAMILY = Family(
    name="qwen3-moe",
    architectures=("Qwen3MoeForCausalLM",),
    models="Qwen3 mixtures of experts, with experts in every layer",
    arguments=arguments,
    rows=rows.decoder(
        rows.SELF_ATTENTION,
        rows.QK_NORMS,
        rows.expert_mlp("mlp", "gate_proj", "up_proj", "down_proj"),
    ),
    extra_states=(*rows.EXPERT_STATES, *rows.QK_NORM_STATES),
)
