"""The rows that decoders share: a family's table is made of these and of its own."""

from megatron_tsft.checkpoint.mapping import TableRow, TensorPattern

HIDDEN, FFN, QUERY, KEY_VALUE, VOCAB = (
    "hidden_size",
    "ffn_hidden_size",
    "query_size",
    "key_value_size",
    "vocab_size",
)
HEAD_SIZE, EXPERT_FFN, EXPERTS = "kv_channels", "moe_ffn_hidden_size", "num_experts"
LAYER = "model.layers.{layer}."
ATTENTION = "decoder.layers.self_attention."
MLP = "decoder.layers.mlp."


def plain(megatron: str, name: str, *dims: str) -> TableRow:
    """A row of one tensor that is the same on both sides."""
    return TableRow(megatron, "plain", (TensorPattern(name, dims),))


def _qkv(suffix: str, *columns: str, when: str | None = None) -> TableRow:
    """Query, key and value (weights or biases), which Megatron keeps in one tensor."""
    dims = {"q": QUERY, "k": KEY_VALUE, "v": KEY_VALUE}
    sources = tuple(
        TensorPattern(f"{LAYER}self_attn.{x}_proj.{suffix}", (dims[x], *columns)) for x in "qkv"
    )
    return TableRow(f"{ATTENTION}linear_qkv.{suffix}", "qkv", sources, when=when)


EMBEDDING = TableRow(
    "embedding.word_embeddings.weight",
    "vocab",
    (TensorPattern("model.embed_tokens.weight", (VOCAB, HIDDEN)),),
)
HEAD = (
    plain("decoder.final_layernorm.weight", "model.norm.weight", HIDDEN),
    TableRow(
        "output_layer.weight",
        "vocab",
        (TensorPattern("lm_head.weight", (VOCAB, HIDDEN)),),
        when="untie_embeddings_and_output_weights",
    ),
)
SELF_ATTENTION = (
    plain(f"{ATTENTION}linear_qkv.layer_norm_weight", f"{LAYER}input_layernorm.weight", HIDDEN),
    _qkv("weight", HIDDEN),
    plain(f"{ATTENTION}linear_proj.weight", f"{LAYER}self_attn.o_proj.weight", HIDDEN, QUERY),
)
QKV_BIAS = (_qkv("bias"),)
QK_NORMS = tuple(
    plain(f"{ATTENTION}{x}_layernorm.weight", f"{LAYER}self_attn.{x}_norm.weight", HEAD_SIZE)
    for x in ("q", "k")
)
DENSE_MLP = (
    plain(f"{MLP}linear_fc1.layer_norm_weight", f"{LAYER}post_attention_layernorm.weight", HIDDEN),
    TableRow(
        f"{MLP}linear_fc1.weight",
        "gate_up",
        tuple(TensorPattern(f"{LAYER}mlp.{x}_proj.weight", (FFN, HIDDEN)) for x in ("gate", "up")),
    ),
    plain(f"{MLP}linear_fc2.weight", f"{LAYER}mlp.down_proj.weight", HIDDEN, FFN),
)


def expert_mlp(block: str, gate: str, up: str, down: str) -> tuple[TableRow, ...]:
    """A router and experts in every layer; `block` is the module that holds both, the others are an
    expert's names."""
    router, expert = f"{LAYER}{block}.gate.weight", f"{LAYER}{block}.experts.{{expert}}."
    experts = f"{MLP}experts.experts."
    return (
        plain(
            "decoder.layers.pre_mlp_layernorm.weight",
            f"{LAYER}post_attention_layernorm.weight",
            HIDDEN,
        ),
        plain(f"{MLP}router.weight", router, EXPERTS, HIDDEN),
        TableRow(
            f"{experts}linear_fc1.weight",
            "gate_up",
            tuple(TensorPattern(f"{expert}{x}.weight", (EXPERT_FFN, HIDDEN)) for x in (gate, up)),
        ),
        plain(f"{experts}linear_fc2.weight", f"{expert}{down}.weight", HIDDEN, EXPERT_FFN),
    )


def decoder(*layer: tuple[TableRow, ...]) -> tuple[TableRow, ...]:
    """A whole table: the embedding, the rows of a layer, and what follows the layers."""
    return (EMBEDDING, *(row for rows in layer for row in rows), *HEAD)


# modules whose `_extra_state` object a model asks for (local
# and Transformer Engine specs), with their placeholders
ATTENTION_STATES = tuple(
    (f"{ATTENTION}{name}", ("layer",)) for name in ("linear_qkv", "linear_proj")
)
FINAL_STATES = (("decoder.final_layernorm", ()),)
DENSE_STATES = (
    *ATTENTION_STATES,
    *((f"{MLP}{name}", ("layer",)) for name in ("linear_fc1", "linear_fc2")),
    *FINAL_STATES,
)
EXPERT_STATES = (
    *ATTENTION_STATES,
    ("decoder.layers.pre_mlp_layernorm", ("layer",)),
    *(
        (f"{MLP}experts.experts.{name}", ("layer", "expert"))
        for name in ("linear_fc1", "linear_fc2")
    ),
    *FINAL_STATES,
)
QK_NORM_STATES = tuple((f"{ATTENTION}{x}_layernorm", ("layer",)) for x in ("q", "k"))
