"""Llama 2, 3, 3.1, 3.2, SmolLM2 and whatever else says LlamaForCausalLM: one table."""

from typing import Any

from megatron_tsft.checkpoint.architecture import decoder_arguments, refuse, rope_arguments
from megatron_tsft.checkpoint.mapping import Family, Row, Source

HIDDEN, FFN, QUERY, KEY_VALUE, VOCAB = "hidden_size", "ffn_hidden_size", "query_size", "key_value_size", "vocab_size"
LAYER = "model.layers.{layer}."


def arguments(config: Any) -> tuple[dict[str, Any], float | None]:
    """LlamaConfig -> (Megatron arguments, rope scaling factor or None)."""
    refuse(
        config, "attention_bias", (None, False), "Llama's also has one on the output projection: Megatron cannot match"
    )
    rope, factor = rope_arguments(config)
    return decoder_arguments(config) | rope, factor


FAMILY = Family(
    name="llama",
    architectures=("LlamaForCausalLM",),
    arguments=arguments,
    rows=(
        Row(
            "embedding.word_embeddings.weight",
            "vocab",
            (Source("model.embed_tokens.weight", (VOCAB, HIDDEN)),),
        ),
        Row(
            "decoder.layers.self_attention.linear_qkv.layer_norm_weight",
            "plain",
            (Source(LAYER + "input_layernorm.weight", (HIDDEN,)),),
        ),
        Row(
            "decoder.layers.self_attention.linear_qkv.weight",
            "qkv",
            (
                Source(LAYER + "self_attn.q_proj.weight", (QUERY, HIDDEN)),
                Source(LAYER + "self_attn.k_proj.weight", (KEY_VALUE, HIDDEN)),
                Source(LAYER + "self_attn.v_proj.weight", (KEY_VALUE, HIDDEN)),
            ),
        ),
        Row(
            "decoder.layers.self_attention.linear_proj.weight",
            "plain",
            (Source(LAYER + "self_attn.o_proj.weight", (HIDDEN, QUERY)),),
        ),
        Row(
            "decoder.layers.mlp.linear_fc1.layer_norm_weight",
            "plain",
            (Source(LAYER + "post_attention_layernorm.weight", (HIDDEN,)),),
        ),
        Row(
            "decoder.layers.mlp.linear_fc1.weight",
            "gate_up",
            (
                Source(LAYER + "mlp.gate_proj.weight", (FFN, HIDDEN)),
                Source(LAYER + "mlp.up_proj.weight", (FFN, HIDDEN)),
            ),
        ),
        Row(
            "decoder.layers.mlp.linear_fc2.weight",
            "plain",
            (Source(LAYER + "mlp.down_proj.weight", (HIDDEN, FFN)),),
        ),
        Row(
            "decoder.final_layernorm.weight",
            "plain",
            (Source("model.norm.weight", (HIDDEN,)),),
        ),
        Row(
            "output_layer.weight",
            "vocab",
            (Source("lm_head.weight", (VOCAB, HIDDEN)),),
            when="untie_embeddings_and_output_weights",
        ),
    ),
    ignored=(r"rotary_emb\.inv_freq$",),  # a buffer that old transformers saved
    extra_states=(
        ("decoder.layers.self_attention.linear_qkv", ("layer",)),
        ("decoder.layers.self_attention.linear_proj", ("layer",)),
        ("decoder.layers.self_attention.core_attention", ("layer",)),  # Transformer Engine only, as is the final norm's
        ("decoder.layers.mlp.linear_fc1", ("layer",)),
        ("decoder.layers.mlp.linear_fc2", ("layer",)),
        ("decoder.final_layernorm", ()),
    ),
)
