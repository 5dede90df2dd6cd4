"""Hugging Face config -> Megatron arguments that dense decoders share; refuses what has none."""

from typing import Any

from megatron_tsft.errors import UserError

# Megatron 0.19 has these three as defaults that no flag changes
# (core/models/common/embeddings/rotary_pos_embedding.py)
LLAMA3_ROPE = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

COUNTS = (
    "num_hidden_layers hidden_size intermediate_size num_attention_heads num_key_value_heads"
    " vocab_size max_position_embeddings"
).split()


def refuse(config: Any, field: str, allowed: tuple[Any, ...], reason: str) -> None:
    """Raise UserError unless `config.field` is one of `allowed`; a missing field counts as None."""
    value = getattr(config, field, None)
    if value not in allowed:
        raise UserError(f"config.json says {field}={value!r}: {reason}")


def decoder_arguments(config: Any) -> dict[str, Any]:
    """Arguments of a dense pre-norm decoder with RMSNorm, SwiGLU, grouped-query attention and
    rotary positions.

    Keys are the destinations of Megatron's own argparse (`--norm-epsilon` is `layernorm_epsilon`).

    Raises:
        UserError: a bias, activation, window, rotary scaling or head count that the Megatron model
            would not have.
    """
    refuse(config, "hidden_act", ("silu",), "only SwiGLU models (silu) can be expressed")
    refuse(
        config,
        "mlp_bias",
        (None, False),
        "Megatron has no flag for a bias in the MLP alone, so it is not supported",
    )
    refuse(
        config,
        "quantization_config",
        (None,),
        "first save the model without quantization, as bf16 safetensors",
    )
    refuse(config, "sliding_window", (None,), "sliding-window attention is not supported")
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        raise UserError(
            f"config.json says layer_types={sorted(kinds)}: only full_attention is supported"
        )
    for field in COUNTS:
        if getattr(config, field) < 1:
            raise UserError(
                f"config.json says {field}={getattr(config, field)}: it must be at least 1"
            )
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    if heads % groups:
        raise UserError(
            f"config.json says {heads} attention heads and {groups} key-value heads: the first must"
            " be a multiple of the second"
        )
    channels = getattr(config, "head_dim", None) or config.hidden_size // heads
    if channels % 2:
        raise UserError(
            f"config.json gives heads of {channels} channels: rotary positions need an even number"
        )
    return {
        "num_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.intermediate_size,
        "num_attention_heads": heads,
        "group_query_attention": groups != heads,
        "num_query_groups": groups,
        "kv_channels": channels,
        "layernorm_epsilon": config.rms_norm_eps,
        "normalization": "RMSNorm",
        "swiglu": True,
        "add_bias_linear": False,
        "add_qkv_bias": False,
        "qk_layernorm": False,
        "untie_embeddings_and_output_weights": not config.tie_word_embeddings,
        "max_position_embeddings": config.max_position_embeddings,
    } | rope_arguments(config)


def expert_arguments(
    config: Any, count: str, ffn_size: int, *, renormalised: bool
) -> dict[str, Any]:
    """Arguments of experts in every layer; `count` is the field that counts them, `ffn_size` is one
    expert's.

    renormalised: the weights of the chosen experts add up to one. Softmax over the chosen experts
    is softmax over all of them, renormalised; otherwise Megatron's router takes the softmax first.

    Raises:
        UserError: no experts, more per token than there are, or one per token with renormalised
            weights (always 1), which Megatron refuses.
    """
    experts, chosen = getattr(config, count), config.num_experts_per_tok
    if ffn_size < 1:
        raise UserError(f"config.json gives experts of {ffn_size} channels: it must be at least 1")
    if not 1 <= chosen <= experts:
        raise UserError(
            f"config.json says {count}={experts} and num_experts_per_tok={chosen}: correct one of"
            " them"
        )
    if chosen == 1 and renormalised:
        raise UserError(
            "config.json says num_experts_per_tok=1: Megatron needs two with renormalised router"
            " weights"
        )
    return {
        "num_experts": experts,
        "moe_router_topk": chosen,
        "moe_ffn_hidden_size": ffn_size,
        "moe_router_pre_softmax": not renormalised,
    }


def rope_arguments(config: Any) -> dict[str, Any]:
    """Rotary arguments; `rope_scaling_factor` stands among them only where there is llama3 scaling.

    Raises:
        UserError: another kind of scaling, partial rotary dimensions, or llama3 constants that
            Megatron hard-codes with other values.
    """
    rope = dict(config.rope_parameters or {})
    if rope.get("rope_theta") is None:
        raise UserError(
            f"config.json gives no rope_theta (found {rope}): add it under rope_parameters"
        )
    kind, theta = rope.get("rope_type", "default"), float(rope["rope_theta"])
    if kind not in ("default", "llama3"):
        raise UserError(
            f"config.json says rope_type={kind!r}: only 'default' and 'llama3' are supported"
        )
    if float(rope.get("partial_rotary_factor") or 1.0) != 1.0:
        raise UserError(
            f"config.json says partial_rotary_factor={rope['partial_rotary_factor']}: only 1 is"
            " supported"
        )
    scaling: dict[str, Any] = {"use_rope_scaling": False}
    if kind == "llama3":
        for name, fixed in LLAMA3_ROPE.items():
            if float(rope[name]) != fixed:
                raise UserError(
                    f"config.json says {name}={rope[name]}: Megatron hard-codes {fixed}, so use a"
                    " model that has it"
                )
        scaling = {"use_rope_scaling": True, "rope_scaling_factor": float(rope["factor"])}
    return {
        "position_embedding_type": "rope",
        "rotary_base": int(theta) if theta.is_integer() else theta,
        "rotary_percent": 1.0,
        "rotary_interleaved": False,
    } | scaling
