"""Packed sequences for Megatron's local spec: causal attention inside each document, none across,
also where a document's positions are spread over context-parallel ranks.

Transformer Engine's attention does this on its own; the local DotProductAttention refuses packed
sequences and context parallelism (megatron/core/transformer/dot_product_attention.py:153 and :58,
0.19.2). This one runs anywhere torch does.
"""

import copy
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.dot_product_attention import DotProductAttention
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from megatron_tsft.data.context_parallel import gathered_order


@dataclass
class PackedSequences(PackedSeqParams):
    """Megatron's packed parameters plus the lengths on the host, so that our attention need not ask
    the device for them (Megatron's unfused rotary embedding does)."""

    lengths: list[int] = field(default_factory=list)
    gathered: Tensor | None = (
        None  # [t] where the ranks' shards, one after the other, hold each position
    )

    def natural_order(self, shards: Tensor, size: int) -> Tensor:
        """[t, ...] in the documents' order, from `shards` [t, ...] of `size` ranks."""
        if self.gathered is None:  # the first layer's; the others read the same packs
            self.gathered = gathered_order(self.lengths, size).to(shards.device, non_blocking=True)
        return shards.index_select(0, self.gathered)


def packed_sequences(
    lengths: list[int], device: torch.device | str, context_size: int = 1
) -> PackedSequences:
    """THD parameters of documents that lie end to end; their lengths add up to the pack's, on all
    ranks together."""
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32).to(
        device, non_blocking=True
    )
    # Transformer Engine asks for the padded lengths under
    # context parallelism; ours are padded already
    padded: dict[str, Any] = {"cu_seqlens_q_padded": cu_seqlens, "cu_seqlens_kv_padded": cu_seqlens}
    return PackedSequences(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=max(lengths),
        max_seqlen_kv=max(lengths),
        lengths=lengths,
        **padded if context_size > 1 else {},
    )


class PackedDotProductAttention(DotProductAttention):
    """Core attention of the local spec that also takes packed sequences."""

    def __init__(self, config: Any, *args: Any, pg_collection: Any = None, **kwargs: Any):
        alone = config
        if config.context_parallel_size > 1:
            alone = copy.copy(config)
            alone.context_parallel_size = (
                1  # Megatron's class asks for it: it knows of no other ranks, we do
            )
        super().__init__(alone, *args, pg_collection=pg_collection, **kwargs)
        self.cp_group = pg_collection.cp if config.context_parallel_size > 1 else None

    def forward(
        self,
        query: Tensor,  # [t/cp, heads/tp, d] when packed
        key: Tensor,  # [t/cp, groups/tp, d]
        value: Tensor,  # [t/cp, groups/tp, d]
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Context [t/cp, heads/tp * d]; unpacked calls go to Megatron's own attention."""
        if packed_seq_params is None:
            assert self.cp_group is None, "context parallelism is for packed sequences"
            return super().forward(
                query, key, value, attention_mask, attn_mask_type, attention_bias
            )
        if isinstance(packed_seq_params, PackedSequences):
            packed = packed_seq_params
        else:
            cu_seqlens = packed_seq_params.cu_seqlens_q
            packed = PackedSequences(lengths=(cu_seqlens[1:] - cu_seqlens[:-1]).tolist())
        if self.cp_group is None:
            documents = zip(*(x.split(packed.lengths) for x in (query, key, value)), strict=True)
            context = [self._attend(*document) for document in documents]
        else:
            context = list(self._spread(query, key, value, packed, self.cp_group))
        return torch.cat(context).reshape(query.shape[0], -1)

    def _spread(
        self, query: Tensor, key: Tensor, value: Tensor, packed: PackedSequences, group: Any
    ) -> Iterator[Tensor]:
        """This rank's two chunks of every document, each against all that comes before it, on
        whichever rank.

        Keys and values are gathered whole; their gradient is reduced and scattered back.
        """
        size, rank = group.size(), group.rank()
        shards = gather_from_sequence_parallel_region(torch.cat([key, value], 1), group=group)
        keys, values = packed.natural_order(shards, size).split([key.shape[1], value.shape[1]], 1)
        at = start = 0
        for length in packed.lengths:
            chunk = length // (2 * size)
            for number in (rank, 2 * size - 1 - rank):
                seen = slice(start, start + (number + 1) * chunk)
                yield self._attend(query[at : at + chunk], keys[seen], values[seen])
                at += chunk
            start += length

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Causal attention [n, heads, d] of the last n of the positions that `key` and `value` [m,
        groups, d] cover."""
        n, m = len(query), len(key)
        # query i stands at position m - n + i; not a tensor, so that flash attention may take it
        earlier = causal_lower_right(n, m) if n < m else None
        return torch.nn.functional.scaled_dot_product_attention(
            *(x.transpose(0, 1).unsqueeze(0) for x in (query, key, value)),
            attn_mask=earlier,
            is_causal=earlier is None,
            dropout_p=self.attention_dropout.p if self.training else 0.0,
            scale=self.softmax_scale,
            enable_gqa=query.shape[1]
            != key.shape[1],  # grouped queries: heads share keys and values
        )[0].transpose(0, 1)


def packed_local_spec(config: Any, vp_stage: int | None = None) -> Any:
    """Megatron's default layer spec for a GPTModelConfig with this attention in it
    (`transformer_layer_spec=`)."""
    from megatron.training.models.gpt import default_layer_spec

    spec: Any = default_layer_spec(config, vp_stage)  # type: ignore[arg-type]  # None without virtual stages
    for layer in getattr(spec, "layer_specs", None) or [spec]:
        layer.submodules.self_attention.submodules.core_attention = PackedDotProductAttention
    return spec
