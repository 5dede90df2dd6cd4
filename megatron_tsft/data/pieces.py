"""What a data set's conversations become in packs of a given length: each as it is, cut to its
first tokens, or, a document of plain text, cut into pieces."""

from dataclasses import dataclass

import numpy as np

from megatron_tsft.data.packing import Ints
from megatron_tsft.data.prepared import PreparedData
from megatron_tsft.errors import UserError

LONG_SAMPLES = ("refuse", "truncate", "split")


@dataclass(frozen=True)
class Pieces:
    """Parts of conversations, in the data set's order.

    Attributes:
        rows: [pieces] the conversation.
        starts: [pieces] the first of its positions; position t predicts token t + 1.
        positions: [pieces] how many, at least 1.
        long: conversations that have more positions than a pack.
        split: whether those were cut into several pieces, else to their first one.
    """

    rows: Ints
    starts: Ints
    positions: Ints
    long: int
    split: bool


def pieces_of(data: PreparedData, seq_length: int, long_samples: str) -> Pieces:
    """The pieces of a data set.

    Each piece but the first of a document begins with the token that the one before it ended by
    predicting, so that every token is predicted once, by what stands in its own piece.

    Args:
        data: a prepared folder.
        seq_length: positions of a pack; n tokens take n - 1.
        long_samples: what happens to longer conversations, one of LONG_SAMPLES.

    Raises:
        UserError: a conversation is too long and may not be cut, or is to be split and is no plain
            text: a piece of a chat would lack its question.
    """
    whole = np.maximum(data.lengths - 1, 1)
    long = np.flatnonzero(whole > seq_length)
    if not len(long) or long_samples == "truncate":
        rows = np.arange(len(data))
        return Pieces(
            rows, np.zeros_like(rows), np.minimum(whole, seq_length), len(long), split=False
        )
    many = (
        f"{data.directory}: {len(long)} of {len(data)} conversations have more than"
        f" {seq_length + 1} tokens (longest: {int(data.lengths.max())}), --seq-length is"
        f" {seq_length}"
    )
    if long_samples == "refuse":
        raise UserError(
            f"{many}: raise it, prepare the data with --max-tokens {seq_length + 1}, or pass"
            " --tsft-long-samples truncate (plain text: split)"
        )
    chats = int((data.supervised()[long] < data.lengths[long] - 1).sum())
    if chats:
        raise UserError(
            f"{many}, and {chats} of them are not plain text, whose pieces would lack what they"
            " answer: raise it, or pass --tsft-long-samples truncate"
        )
    counts = -(-whole // seq_length)
    rows = np.repeat(np.arange(len(data)), counts)
    starts = (np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)) * seq_length
    return Pieces(rows, starts, np.minimum(whole[rows] - starts, seq_length), len(long), split=True)
