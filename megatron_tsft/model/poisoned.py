"""The error for numbers that are not finite: none of them is saved."""

from collections.abc import Sequence

import torch

from megatron_tsft.errors import UserError

NOTHING_SAVED = (
    "nothing of this step is saved, the same command goes on from the last checkpoint (from an"
    " earlier one with --ckpt-step)"
)


def rank() -> int:
    """This process' rank; 0 where there is no group."""
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def poisoned(step: int, what: str, conversations: Sequence[str]) -> UserError:
    """The error of the rank that has the numbers.

    Args:
        step: from 1.
        what: is not finite.
        conversations: that it came of.
    """
    error = UserError(
        f"step {step}, rank {rank()}: {what} ({'; '.join(conversations)}): {NOTHING_SAVED}; lower"
        " --lr, or leave these conversations out"
    )
    error.met_here_alone = True
    return error
