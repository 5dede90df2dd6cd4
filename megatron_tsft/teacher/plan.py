"""Which conversations a cache holds, in which shard: a function of the data and k alone."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_tsft.data.packing import Ints
from megatron_tsft.data.prepared import PreparedData
from megatron_tsft.teacher.format import LARGEST_SHARD, SHARDS, SMALLEST_SHARD, expected_bytes


@dataclass(frozen=True)
class CachePlan:
    """The distinct conversations of some data sets, in order of first appearance, cut into shards.

    Attributes:
        data: the prepared data sets.
        of: [conversations] which data set each is read from.
        row: [conversations] its row there.
        supervised: [conversations] its supervised tokens.
        starts: [shards + 1]: shard i holds the conversations [starts[i], starts[i + 1]).
    """

    data: Sequence[PreparedData]
    of: Ints
    row: Ints
    supervised: Ints
    starts: Ints

    @property
    def conversations(self) -> int:
        return len(self.row)

    @property
    def tokens(self) -> int:
        """Supervised tokens."""
        return int(self.supervised.sum())

    @property
    def shards(self) -> int:
        return len(self.starts) - 1

    @property
    def borders(self) -> str:
        """16 hex digits over where the shards begin."""
        return hashlib.sha256(self.starts.astype("<i8").tobytes()).hexdigest()[:16]

    @property
    def lengths(self) -> Ints:
        """[conversations] tokens of each."""
        out = np.empty(self.conversations, np.int64)
        for i, data in enumerate(self.data):
            out[self.of == i] = data.lengths[self.row[self.of == i]]
        return out


def plan_cache(
    data: Sequence[PreparedData], top_k: int, shard_bytes: int | None = None
) -> CachePlan:
    """Plan a cache; a shard is full at `shard_bytes` (default: by the size of the data)."""
    ids = np.concatenate([part.sample_ids.to_numpy() for part in data])
    _, first = np.unique(ids, return_index=True)
    first.sort()
    of = np.concatenate([np.full(len(part), i) for i, part in enumerate(data)])[first]
    row = np.concatenate([np.arange(len(part)) for part in data])[first]
    supervised = np.concatenate([part.supervised() for part in data])[first]
    sizes = np.array([expected_bytes(1, int(n), top_k) for n in supervised])
    full = (
        min(max(int(sizes.sum()) // SHARDS, SMALLEST_SHARD), LARGEST_SHARD)
        if shard_bytes is None
        else shard_bytes
    )
    starts, held = [0], 0
    for i, size in enumerate(sizes.tolist()):
        if held and held + size > full:
            starts.append(i)
            held = 0
        held += size
    return CachePlan(data, of, row, supervised, np.array([*starts, len(row)]))
