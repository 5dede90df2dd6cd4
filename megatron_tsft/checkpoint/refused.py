"""Architectures that users ask for and that are not served, with the reason (Megatron 0.19.2)."""

_GEMMA_NORMS = "norms behind attention and MLP, for which Megatron's layer has no place"
_GEMMA_SCALE = "embeddings scaled by sqrt(hidden size)"

REFUSED = {
    "GemmaForCausalLM": "embeddings are scaled by sqrt(hidden size): Megatron has that only as a"
    " part of muP",
    "Gemma2ForCausalLM": f"tanh soft-capping, which Megatron does not have, {_GEMMA_NORMS},"
    f" {_GEMMA_SCALE}",
    "Gemma3ForCausalLM": f"two rotary bases in one model, {_GEMMA_NORMS}, {_GEMMA_SCALE}",
    "Gemma3ForConditionalGeneration": "a vision model, and the text model's two rotary bases and"
    " extra norms",
    "Qwen2MoeForCausalLM": "a gated shared expert beside the routed ones has no table yet",
    "Qwen3NextForCausalLM": "linear attention in most layers has no table yet",
    "DeepseekV3ForCausalLM": "multi-head latent attention has no table yet",
    "GptOssForCausalLM": "attention sinks, alternating windows and clamped experts have no table"
    " yet",
    "Llama4ForConditionalGeneration": "layers without rotary positions and chunked attention",
    "Phi3ForCausalLM": "query, key and value in one tensor, in an order of its own, have no table"
    " yet",
}
