"""The k most likely tokens of a teacher with a sharded vocabulary, without gathering its logits."""

import math

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tsft.loss.collectives import all_gather
from megatron_tsft.loss.records import TeacherRecords
from megatron_tsft.loss.teacher import FLOOR

CHUNK_BYTES = 4 << 20  # fp32 scratch on the CPU, which stays in the cache
CHUNK_BYTES_CUDA = 256 << 20
LOG2E = math.log2(math.e)


def teacher_topk(
    logits: Tensor,  # [n, V/tp]
    labels: Tensor,  # [n] int64, global ids
    top_k: int,
    *,
    vocab_size: int,
    temperature: float = 1.0,
    absent: Tensor | None = None,  # [V/tp] bool
    tp_group: "dist.ProcessGroup | None" = None,
) -> TeacherRecords[Tensor]:
    """Top-k, log T(y) and the exact tail mass of softmax(logits / temperature), in fp32.

    One collective: an all-gather of each rank's k candidates and two numbers a token. Every rank of
    `tp_group` returns the same.

    Args:
        logits: [n, V/tp] this rank's columns, any floating type.
        labels: [n] int64 in [0, vocab_size).
        top_k: k; at most vocab_size.
        vocab_size: the true vocabulary; columns at or beyond it are padding.
        absent: [V/tp] columns without a counterpart in the student's vocabulary: they get no mass.

    Returns:
        ids [n, k] int64 and logprobs [n, k] fp32, most likely first (-1 and -inf where fewer tokens
        have any mass); label_logp and tail_logmass [n] fp32.
    """
    width = logits.shape[1]
    rows = max(1, (CHUNK_BYTES_CUDA if logits.is_cuda else CHUNK_BYTES) // (4 * width))
    ranks = 1 if tp_group is None else tp_group.size()
    first = 0 if tp_group is None else tp_group.rank() * width
    columns = min(max(vocab_size - first, 0), width)
    k = min(top_k, vocab_size)
    parts = []
    for begin in range(0, max(len(labels), 1), rows):
        z = torch.mul(
            logits[begin : begin + rows].float(), LOG2E / temperature
        )  # a copy, to be written over
        z[:, columns:] = -torch.inf
        if absent is not None:
            z[:, absent] = -torch.inf
        parts.append(_local(z, labels[begin : begin + rows] - first, min(k, width), first))
    local = torch.cat(parts)  # [n, 2 * k' + 2]
    gathered = local[None] if ranks == 1 or tp_group is None else all_gather(local, tp_group)
    return _merge(gathered, k)


def _local(z: Tensor, label: Tensor, k: int, first: int) -> Tensor:
    """This shard's k largest logits, their global ids, the mass of its other columns and its logit
    at the label, fp64.

    Args:
        z: [n, w] fp32 logits in bits (times log2 e), because exp2 is faster than exp; written over.
        label: [n] counted from this shard's first column.

    Returns:
        [n, 2 k + 2] fp64, in which ids are exact: values, ids, sum of 2^(z - values[0]) over the
        rest, z at the label.
    """
    values, ids = z.topk(k)
    here = (label >= 0) & (label < z.shape[1])
    z_y = torch.where(here, z.gather(1, torch.where(here, label, 0)[:, None])[:, 0], -torch.inf)
    z.scatter_(1, ids, -torch.inf)
    # without the k: there is nothing to cancel
    rest = z.sub_(values[:, :1].clamp(min=FLOOR)).exp2_().sum(1)
    return torch.cat(
        [values.double(), (ids + first).double(), rest.double()[:, None], z_y.double()[:, None]], 1
    )


def _merge(shards: Tensor, k: int) -> TeacherRecords[Tensor]:
    """The records from all shards' candidates, [ranks, n, 2 k' + 2]; equal on every rank."""
    candidates = (shards.shape[2] - 2) // 2
    values = shards[..., :candidates].permute(1, 0, 2).flatten(1)  # [n, ranks * k']
    ids = shards[..., candidates:-2].permute(1, 0, 2).flatten(1)
    m = values.amax(1, keepdim=True)
    top, place = values.topk(k)
    ids = ids.gather(1, place).long()
    left = values.scatter(1, place, -torch.inf)  # candidates that other shards' outdid
    shift = torch.exp2(shards[..., 0].clamp(min=FLOOR) - m.T)  # [ranks, n]
    tail = torch.exp2(left - m).sum(1) + (shards[..., -2] * shift).sum(0)
    log_s = torch.log2(torch.exp2(top - m).sum(1) + tail)
    label = shards[..., -1].amax(0)

    def nats(bits: Tensor) -> Tensor:
        return (bits / LOG2E).float()

    return TeacherRecords(
        ids=torch.where(top > -torch.inf, ids, -1),
        logprobs=nats(top - m - log_s[:, None]),
        label_logp=nats(label - m[:, 0] - log_s),
        tail_logmass=nats(torch.log2(tail) - log_s),
    )
