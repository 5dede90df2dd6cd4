"""A tiny GPTModel of Megatron's local layer spec under DDP, for ranks that have installed the CPU
layer."""

from typing import Any

import torch

VOCABULARY, LENGTH = 64, 16


def tiny_gpt(**config: Any) -> Any:
    """DDP around two layers with RMSNorm and a tied embedding; its numbers do not depend on the
    parallel layout."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig

    distributed = DistributedDataParallelConfig(
        use_distributed_optimizer=config.pop("distributed_optimizer", False)
    )
    transformer = TransformerConfig(
        num_layers=2,
        hidden_size=32,
        ffn_hidden_size=48,  # no gate: at TP 2 gate and up of random weights would be other rows
        num_attention_heads=4,
        normalization="RMSNorm",
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        **config,
    )
    torch.manual_seed(3)
    model = GPTModel(
        config=transformer,
        transformer_layer_spec=get_gpt_layer_local_spec(normalization="RMSNorm"),
        vocab_size=VOCABULARY,
        max_sequence_length=LENGTH,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=True,
    )
    return DistributedDataParallel(transformer, distributed, model)


def backward(model: Any, seed: int) -> float:
    """One micro-batch of two random sequences; gradients are reduced as in training. Returns the
    mean loss."""
    from megatron.core.distributed.finalize_model_grads import finalize_model_grads

    tokens = torch.randint(
        VOCABULARY, (2, LENGTH + 1), generator=torch.Generator().manual_seed(seed)
    )
    mask = torch.triu(torch.ones(LENGTH, LENGTH, dtype=torch.bool), 1)[None, None]
    positions = torch.arange(LENGTH).expand(2, LENGTH)
    model.zero_grad_buffer()
    loss = model(tokens[:, :-1], positions, mask, labels=tokens[:, 1:].contiguous()).mean()
    loss.backward()
    finalize_model_grads([model])
    return loss.item()
