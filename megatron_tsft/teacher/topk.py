"""The k most likely tokens of a teacher whose vocabulary is sharded: the whole logits are never gathered."""

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tsft.loss.collectives import all_gather
from megatron_tsft.loss.records import TeacherTopK

CHUNK_BYTES = 64 << 20  # fp32 scratch


def teacher_topk(
    logits: Tensor,  # [n, V/tp]
    labels: Tensor,  # [n] int64, global ids
    top_k: int,
    *,
    vocab_size: int,
    temperature: float = 1.0,
    absent: Tensor | None = None,  # [V/tp] bool
    tp_group: "dist.ProcessGroup | None" = None,
) -> TeacherTopK:
    """Top-k, log T(y) and the exact tail mass of softmax(logits / temperature), in fp32.

    Two small collectives a chunk of tokens: the k candidates of each rank, and two sums. Every rank of `tp_group`
    returns the same.

    Args:
        logits: [n, V/tp] this rank's columns, any floating type.
        labels: [n] int64 in [0, vocab_size).
        top_k: k; at most vocab_size.
        vocab_size: the true vocabulary; columns at or beyond it are padding.
        absent: [V/tp] columns without a counterpart in the student's vocabulary: they get no mass.

    Returns:
        ids [n, k] int64 and logprobs [n, k] fp32, most likely first (-1 and -inf where fewer tokens have any mass);
        label_logprobs and tail_logmass [n] fp32.
    """
    rows = max(1, CHUNK_BYTES // (4 * logits.shape[1]))
    world = 1 if tp_group is None else tp_group.size()
    first = 0 if tp_group is None else tp_group.rank() * logits.shape[1]
    columns = min(max(vocab_size - first, 0), logits.shape[1])
    parts = []
    for begin in range(0, max(len(labels), 1), rows):
        z = logits[begin : begin + rows].float() / temperature
        z[:, columns:] = -torch.inf
        if absent is not None:
            z[:, absent] = -torch.inf
        parts.append(_chunk(z, labels[begin : begin + rows], min(top_k, vocab_size), first, world, tp_group))
    ids, logprobs, label, tail = (torch.cat(x) for x in zip(*parts, strict=True))
    return TeacherTopK(ids, logprobs, label_logprobs=label, tail_logmass=tail)


def _chunk(
    z: Tensor, labels: Tensor, k: int, first: int, world: int, group: "dist.ProcessGroup | None"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """z [n, w] fp32 is written over."""
    values, ids = z.topk(min(k, z.shape[1]))
    ids = ids + first
    if world > 1:
        assert group is not None
        # one message: ids are exact in fp64; each rank then picks from the same numbers in the same order
        gathered = all_gather(torch.stack([values.double(), ids.double()]), group).permute(1, 2, 0, 3).flatten(2)
        values, place = gathered[0].topk(k)  # [n, k]
        ids = gathered[1].gather(1, place).long()
    m = values[:, :1].double()
    label = labels - first
    here = (label >= 0) & (label < z.shape[1])
    z_y = z.gather(1, torch.where(here, label, 0)[:, None])[:, 0].double()
    own = (ids >= first) & (ids < first + z.shape[1])
    row, column = torch.nonzero(own, as_tuple=True)
    z[row, ids[row, column] - first] = -torch.inf
    tail = z.sub_(m).exp_().sum(1, dtype=torch.float64)  # what is left is the tail: nothing to cancel
    sums = torch.stack([tail, torch.where(here, z_y, 0)])
    if world > 1:
        dist.all_reduce(sums, group=group)
    top = (values.double() - m).exp().sum(1)
    log_s = torch.log(top + sums[0])
    return (
        torch.where(values > -torch.inf, ids, -1),
        (values.double() - m - log_s[:, None]).float(),
        (sums[1] - m[:, 0] - log_s).float(),
        (torch.log(sums[0]) - log_s).float(),
    )
