"""Megatron's arguments of a model that a card keeps, and what each of them may be."""

from typing import Any, NotRequired, TypedDict

from megatron_tsft.typed import Count, Parts, Positive, typed


class DecoderArguments(TypedDict):
    """Of every model; keys are the destinations of Megatron's own argparse."""

    num_layers: Parts
    hidden_size: Count
    ffn_hidden_size: Count
    num_attention_heads: Parts
    group_query_attention: bool
    num_query_groups: Parts
    kv_channels: Count
    layernorm_epsilon: Positive
    normalization: str
    swiglu: bool
    add_bias_linear: bool
    add_qkv_bias: bool
    qk_layernorm: bool
    untie_embeddings_and_output_weights: bool
    max_position_embeddings: Count
    position_embedding_type: str
    rotary_base: Count | Positive
    rotary_percent: Positive
    rotary_interleaved: bool
    use_rope_scaling: bool
    rope_scaling_factor: NotRequired[Positive]


class ExpertArguments(DecoderArguments):
    """Of a model with experts."""

    num_experts: Parts
    moe_router_topk: Parts
    moe_ffn_hidden_size: Count
    moe_router_pre_softmax: bool


def check_arguments(arguments: dict[str, Any]) -> None:
    """Raise ValueError where one is missing or of another type; a family may have others."""
    of_experts = ExpertArguments.__annotations__.keys() - DecoderArguments.__annotations__.keys()
    kind = ExpertArguments if of_experts & arguments.keys() else DecoderArguments
    known = {name: value for name, value in arguments.items() if name in kind.__annotations__}
    typed(known, kind, "megatron_arguments")
