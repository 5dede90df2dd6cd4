"""Packed sequences for Megatron's local spec: causal attention inside each document, none across.

Transformer Engine's attention does this on its own; the local DotProductAttention refuses packed sequences
(megatron/core/transformer/dot_product_attention.py:153, 0.19.2). This one runs anywhere torch does.
"""

import itertools
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.dot_product_attention import DotProductAttention
from torch import Tensor


@dataclass
class PackedSequences(PackedSeqParams):
    """Megatron's packed parameters plus the lengths on the host, so that no layer has to ask the device for them."""

    lengths: list[int] = field(default_factory=list)


def packed_sequences(lengths: list[int], device: torch.device | str) -> PackedSequences:
    """THD parameters of documents that lie end to end; their lengths add up to the pack's."""
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32).to(device, non_blocking=True)
    return PackedSequences(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=max(lengths),
        max_seqlen_kv=max(lengths),
        lengths=lengths,
    )


class PackedDotProductAttention(DotProductAttention):
    """Core attention of the local spec that also takes packed sequences."""

    def forward(
        self,
        query: Tensor,  # [t, heads/tp, d] when packed
        key: Tensor,  # [t, groups/tp, d]
        value: Tensor,  # [t, groups/tp, d]
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Context [t, heads/tp * d]; unpacked calls go to Megatron's own attention."""
        if packed_seq_params is None:
            return super().forward(query, key, value, attention_mask, attn_mask_type, attention_bias)
        if isinstance(packed_seq_params, PackedSequences):
            lengths = packed_seq_params.lengths
        else:
            cu_seqlens = packed_seq_params.cu_seqlens_q
            lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).tolist()
        dropout = self.attention_dropout.p if self.training else 0.0
        shared = query.shape[1] != key.shape[1]  # grouped queries: heads share keys and values
        documents = zip(query.split(lengths), key.split(lengths), value.split(lengths), strict=True)
        context = [
            torch.nn.functional.scaled_dot_product_attention(
                *(x.transpose(0, 1).unsqueeze(0) for x in (q, k, v)),
                is_causal=True,
                dropout_p=dropout,
                scale=self.softmax_scale,
                enable_gqa=shared,
            )[0].transpose(0, 1)
            for q, k, v in documents
        ]
        return torch.cat(context).reshape(query.shape[0], -1)


def packed_local_spec(config: Any, vp_stage: int | None = None) -> Any:
    """Megatron's default layer spec for a GPTModelConfig with this attention in it (`transformer_layer_spec=`)."""
    from megatron.training.models.gpt import default_layer_spec

    spec: Any = default_layer_spec(config, vp_stage)  # type: ignore[arg-type]  # None without virtual stages
    for layer in getattr(spec, "layer_specs", None) or [spec]:
        layer.submodules.self_attention.submodules.core_attention = PackedDotProductAttention
    return spec
