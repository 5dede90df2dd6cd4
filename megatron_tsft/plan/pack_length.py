"""What packs and conversations must be multiples of, so that every rank's share is made of whole
chunks and blocks."""

import math

from megatron_tsft.errors import UserError
from megatron_tsft.plan.flags import Flags
from megatron_tsft.plan.precision import scaled_format


def document_multiple(flags: Flags, chosen: int = 0) -> int:
    """What each conversation is padded to a multiple of: context parallelism cuts two chunks a
    rank.

    Args:
        flags: of the run.
        chosen: --tsft-document-multiple; 0 leaves it to the layout.

    Raises:
        UserError: `chosen` cannot be cut.
    """
    context = flags.context_parallel_size
    if chosen < 0:
        raise UserError(f"--tsft-document-multiple {chosen}: pass at least 1, or leave it out")
    needed = 2 * context if context > 1 else 1
    if chosen % needed:
        raise UserError(
            f"--tsft-document-multiple {chosen} does not go with --context-parallel-size {context},"
            f" which cuts each conversation into {needed} chunks: pass a multiple of {needed}, or"
            " leave it out"
        )
    return chosen or needed


def pack_multiple(flags: Flags, chosen: int = 0) -> int:
    """What --seq-length must be a multiple of.

    Context parallelism and sequence parallelism cut a pack into parts, each a multiple of a number
    format's block; and the pack's tail, a document of its own, is cut as conversations are.
    """
    scaled = scaled_format(flags)
    parts = flags.context_parallel_size * _sequence_parallel(flags)
    block = scaled.recipe.block if scaled else 1
    return math.lcm(parts * block, document_multiple(flags, chosen))


def check_pack(flags: Flags, chosen: int = 0) -> None:
    """Raise UserError where a pack does not divide; the message names lengths that do.

    Args:
        flags: of the run, with --sequence-parallel as the run will have it.
        chosen: --tsft-document-multiple; 0 leaves it to the layout.
    """
    length, multiple = flags.pack_length, pack_multiple(flags, chosen)
    if length % multiple == 0:
        return
    context, tensor = flags.context_parallel_size, _sequence_parallel(flags)
    scaled = scaled_format(flags)
    reasons = [
        f"--context-parallel-size {context}" if context > 1 else "",
        f"--sequence-parallel over {tensor} ranks" if tensor > 1 else "",
        f"{scaled.name}'s blocks of {scaled.recipe.block} tokens" if scaled else "",
        f"--tsft-document-multiple {chosen}" if chosen else "",
    ]
    below = length // multiple * multiple
    fit = f"{below} or {below + multiple}" if below else f"{multiple}"
    raise UserError(
        f"--seq-length {length} is not a multiple of {multiple}, which"
        f" {' with '.join(filter(None, reasons))} asks for: pass {fit}"
    )


def _sequence_parallel(flags: Flags) -> int:
    """Over how many tensor-parallel ranks a pack's tokens are cut."""
    return flags.tensor_model_parallel_size if flags.sequence_parallel else 1
