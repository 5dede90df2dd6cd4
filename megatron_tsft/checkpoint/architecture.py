"""Hugging Face config -> Megatron arguments that dense decoders share; refuses what has none."""

from types import SimpleNamespace
from typing import Any

from megatron_tsft.errors import UserError
from megatron_tsft.typed import Count, Misfit, Parts, Positive, typed

# Megatron 0.19 has these three as defaults that no flag changes
# (core/models/common/embeddings/rotary_pos_embedding.py)
LLAMA3_ROPE = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def value_of(config: Any, field: str, kind: Any) -> Any:
    """`config.field`, which must be of a type as `typed` has them; a missing field counts as null.

    Raises:
        UserError: it is not.
    """
    try:
        return typed(getattr(config, field, None), kind, field)
    except Misfit as error:
        raise UserError(f"config.json says {error}") from error


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
    kinds = set(value_of(config, "layer_types", list[str] | None) or ["full_attention"])
    if kinds != {"full_attention"}:
        raise UserError(
            f"config.json says layer_types={sorted(kinds)}: only full_attention is supported"
        )
    width = value_of(config, "hidden_size", Count)
    heads = value_of(config, "num_attention_heads", Parts)
    groups = value_of(config, "num_key_value_heads", Parts)
    if heads % groups:
        raise UserError(
            f"config.json says {heads} attention heads and {groups} key-value heads: the first must"
            " be a multiple of the second"
        )
    channels = value_of(config, "head_dim", Count | None)
    if channels is None and width % heads:
        raise UserError(
            f"config.json says {heads} attention heads in a hidden_size of {width} and no head_dim:"
            " the second must be a multiple of the first"
        )
    channels = channels or width // heads
    if channels % 2:
        raise UserError(
            f"config.json gives heads of {channels} channels: rotary positions need an even number"
        )
    return {
        "num_layers": value_of(config, "num_hidden_layers", Parts),
        "hidden_size": width,
        "ffn_hidden_size": value_of(config, "intermediate_size", Count),
        "num_attention_heads": heads,
        "group_query_attention": groups != heads,
        "num_query_groups": groups,
        "kv_channels": channels,
        "layernorm_epsilon": value_of(config, "rms_norm_eps", Positive),
        "normalization": "RMSNorm",
        "swiglu": True,
        "add_bias_linear": False,
        "add_qkv_bias": False,
        "qk_layernorm": False,
        "untie_embeddings_and_output_weights": not value_of(config, "tie_word_embeddings", bool),
        "max_position_embeddings": value_of(config, "max_position_embeddings", Count),
    } | rope_arguments(config)


def expert_arguments(
    config: Any, count: str, ffn_size: str, *, renormalised: bool
) -> dict[str, Any]:
    """Arguments of experts in every layer; `count` is the field that counts them, `ffn_size` the
    one that says how many channels one has.

    renormalised: the weights of the chosen experts add up to one. Softmax over the chosen experts
    is softmax over all of them, renormalised; otherwise Megatron's router takes the softmax first.

    Raises:
        UserError: no experts, more per token than there are, or one per token with renormalised
            weights (always 1), which Megatron refuses.
    """
    experts = value_of(config, count, Parts)
    chosen = value_of(config, "num_experts_per_tok", Parts)
    if chosen > experts:
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
        "moe_ffn_hidden_size": value_of(config, ffn_size, Count),
        "moe_router_pre_softmax": not renormalised,
    }


def rope_arguments(config: Any) -> dict[str, Any]:
    """Rotary arguments; `rope_scaling_factor` stands among them only where there is llama3 scaling.

    Raises:
        UserError: another kind of scaling, partial rotary dimensions, or llama3 constants that
            Megatron hard-codes with other values.
    """
    rope = SimpleNamespace(**value_of(config, "rope_parameters", dict[str, Any] | None) or {})
    if getattr(rope, "rope_theta", None) is None:
        raise UserError(
            f"config.json gives no rope_theta (found {vars(rope)}): add it under rope_parameters"
        )
    kind, theta = getattr(rope, "rope_type", "default"), value_of(rope, "rope_theta", Positive)
    if kind not in ("default", "llama3"):
        raise UserError(
            f"config.json says rope_type={kind!r}: only 'default' and 'llama3' are supported"
        )
    if value_of(rope, "partial_rotary_factor", Positive | None) not in (None, 1):
        raise UserError(
            f"config.json says partial_rotary_factor={rope.partial_rotary_factor}: only 1 is"
            " supported"
        )
    scaling: dict[str, Any] = {"use_rope_scaling": False}
    if kind == "llama3":
        for name, fixed in LLAMA3_ROPE.items():
            if value_of(rope, name, Positive) != fixed:
                raise UserError(
                    f"config.json says {name}={getattr(rope, name)}: Megatron hard-codes {fixed},"
                    " so use a model that has it"
                )
        factor = float(value_of(rope, "factor", Positive))
        scaling = {"use_rope_scaling": True, "rope_scaling_factor": factor}
    return {
        "position_embedding_type": "rope",
        "rotary_base": int(theta) if float(theta).is_integer() else theta,
        "rotary_percent": 1.0,
        "rotary_interleaved": False,
    } | scaling
