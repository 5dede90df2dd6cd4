"""Qwen3 mixtures of experts (Qwen3MoeForCausalLM): q and k norms, a router, experts in every layer."""

from typing import Any

from megatron_tsft.checkpoint.architecture import decoder_arguments, refuse, rope_arguments
from megatron_tsft.checkpoint.families.llama import FAMILY as LLAMA
from megatron_tsft.checkpoint.families.llama import HIDDEN, LAYER
from megatron_tsft.checkpoint.mapping import Family, Row, Source

FFN = "moe_ffn_hidden_size"
EXPERT = LAYER + "mlp.experts.{expert}."


def arguments(config: Any) -> tuple[dict[str, Any], float | None]:
    """Qwen3MoeConfig -> (Megatron arguments, rope scaling factor or None)."""
    refuse(config, "attention_bias", (None, False), "Qwen3's attention has none: not supported")
    refuse(config, "decoder_sparse_step", (1,), "dense layers between sparse ones are not supported")
    refuse(config, "mlp_only_layers", (None, []), "dense layers between sparse ones are not supported")
    rope, factor = rope_arguments(config)
    experts = {
        "num_experts": config.num_experts,
        "moe_router_topk": config.num_experts_per_tok,
        FFN: config.moe_intermediate_size,
        # softmax over the chosen experts is softmax over all of them, renormalised
        "moe_router_pre_softmax": not config.norm_topk_prob,
        "qk_layernorm": True,
    }
    return decoder_arguments(config) | rope | experts, factor


FAMILY = Family(
    name="qwen3-moe",
    architectures=("Qwen3MoeForCausalLM",),
    arguments=arguments,
    rows=(
        *(
            row
            for row in LLAMA.rows
            if ".mlp.linear_fc1.weight" not in row.megatron and "linear_fc2" not in row.megatron
        ),
        Row(
            "decoder.layers.self_attention.q_layernorm.weight",
            "plain",
            (Source(LAYER + "self_attn.q_norm.weight", ("kv_channels",)),),
        ),
        Row(
            "decoder.layers.self_attention.k_layernorm.weight",
            "plain",
            (Source(LAYER + "self_attn.k_norm.weight", ("kv_channels",)),),
        ),
        Row("decoder.layers.mlp.router.weight", "plain", (Source(LAYER + "mlp.gate.weight", ("num_experts", HIDDEN)),)),
        Row(
            "decoder.layers.mlp.experts.experts.linear_fc1.weight",
            "gate_up",
            (
                Source(EXPERT + "gate_proj.weight", (FFN, HIDDEN)),
                Source(EXPERT + "up_proj.weight", (FFN, HIDDEN)),
            ),
        ),
        Row(
            "decoder.layers.mlp.experts.experts.linear_fc2.weight",
            "plain",
            (Source(EXPERT + "down_proj.weight", (HIDDEN, FFN)),),
        ),
    ),
    ignored=LLAMA.ignored,
    extra_states=(
        ("decoder.layers.self_attention.linear_qkv", ("layer",)),
        ("decoder.layers.self_attention.linear_proj", ("layer",)),
        ("decoder.layers.self_attention.core_attention", ("layer",)),
        ("decoder.layers.mlp.experts.experts.linear_fc1", ("layer", "expert")),
        ("decoder.layers.mlp.experts.experts.linear_fc2", ("layer", "expert")),
        ("decoder.final_layernorm", ()),
    ),
)
