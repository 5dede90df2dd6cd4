"""Which positions of a micro-batch each context-parallel rank holds: two chunks of every document,
from both its ends.

A document of n positions is cut into 2 * size chunks; rank r has chunk r and chunk 2 * size - 1 -
r, so that every rank has as many pairs of a causal attention (Megatron's and Transformer Engine's
own cut for packed sequences: megatron/core/utils.py,
_get_batch_on_this_cp_rank_per_document_balancing). Megatron's function cuts four tensors by their
names; ours returns the positions, so that weights, sequence numbers and teacher records are cut
alike.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def positions_on_rank(lengths: Sequence[int], rank: int, size: int) -> Tensor:
    """[t / size] int64, on the host: where in the micro-batch each of this rank's positions is.

    Args:
        lengths: positions of each document, multiples of 2 * size; they add up to t.
        rank: in the context-parallel group.
        size: of that group.
    """
    whole = np.asarray(lengths, np.int64)
    odd = whole[whole % (2 * size) != 0]
    if len(odd):
        raise ValueError(
            f"a document of {odd[0]} positions cannot be cut into {2 * size} chunks for {size}"
            " ranks"
        )
    chunk, starts = whole // (2 * size), np.cumsum(whole) - whole
    firsts = np.stack(
        [starts + rank * chunk, starts + (2 * size - 1 - rank) * chunk], axis=1
    ).reshape(-1)
    counts = np.repeat(chunk, 2)
    within = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
    return torch.from_numpy(np.repeat(firsts, counts) + within)


def gathered_order(lengths: Sequence[int], size: int) -> Tensor:
    """[t] int64, on the host: where in the ranks' shards, one after the other, each position of the
    micro-batch is."""
    held = torch.cat([positions_on_rank(lengths, rank, size) for rank in range(size)])
    order = torch.empty_like(held)
    order[held] = torch.arange(len(held))
    return order
