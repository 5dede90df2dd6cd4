"""Several packed data sets in fixed shares, as one endless list: i alone decides pack i."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from megatron_tsft.data.packed_dataset import ENDLESS, PackedDataset

PARTS = 1 << 32  # shares are rounded to one of so many parts


def blend_place(index: int, shares: Sequence[float]) -> tuple[int, int]:
    """(member, its own item) of item `index`: after any number of items each member has had its
    share, to within half an item a split: one item for two or three members, two for five.

    Each member in turn splits what the members before it left, by the rule that of n items the
    first round(n * share) are its own; whole numbers, so it is exact at any index.
    """
    left = sum(shares)
    for member, share in enumerate(shares[:-1]):
        part = round(share / left * PARTS)
        before, after = ((n * part + PARTS // 2) // PARTS for n in (index, index + 1))
        if after > before:
            return member, before
        index, left = index - before, left - share
    return len(shares) - 1, index


class BlendedPacks(Dataset[dict[str, Tensor]]):
    """Packs of several data sets; an item says which one it comes from (`dataset`, a scalar)."""

    def __init__(
        self, members: Sequence[PackedDataset], shares: Sequence[float], split: Any = None
    ):
        """
        Args:
            members: planned with global_batch_size=1, so that their epochs have no masked packs.
            shares: of the packs, positive; they need not add up to 1.
            split: Megatron's.
        """
        self.members, self.shares, self.split = list(members), list(shares), split

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        member, own = blend_place(index, self.shares)
        item = self.members[member][own]
        return item | {"index": torch.tensor(index), "dataset": torch.tensor(member)}

    def supervised_tokens(self, index: int) -> int:
        """Supervised tokens of one pack."""
        member, own = blend_place(index, self.shares)
        return self.members[member].supervised_tokens(own)

    def where(self, index: int) -> str:
        """What a pack holds, for messages."""
        member, own = blend_place(index, self.shares)
        return self.members[member].where(own)
