"""What packs and conversations must be multiples of, so that every rank's share is made of whole
chunks and blocks."""

import math
from collections.abc import Mapping
from typing import Any

from megatron_tsft.errors import UserError
from megatron_tsft.training.config import destination
from megatron_tsft.training.precision import asked


def document_multiple(given: Mapping[str, Any]) -> int:
    """What each conversation is padded to a multiple of: context parallelism cuts two chunks a
    rank.

    Raises:
        UserError: --tsft-document-multiple says another that cannot be cut.
    """
    context, wanted = (
        given.get("context_parallel_size", 1),
        given.get(destination("document_multiple"), 0),
    )
    if wanted < 0:
        raise UserError(f"--tsft-document-multiple {wanted}: pass at least 1, or leave it out")
    needed = 2 * context if context > 1 else 1
    if wanted % needed:
        raise UserError(
            f"--tsft-document-multiple {wanted} does not go with --context-parallel-size"
            f" {context}, which cuts each"
            f" conversation into {needed} chunks: pass a multiple of {needed}, or leave it out"
        )
    return wanted or needed


def pack_multiple(given: Mapping[str, Any]) -> int:
    """What --seq-length must be a multiple of.

    Context parallelism and sequence parallelism cut a pack into parts, each a multiple of a number
    format's block; and the pack's tail, a document of its own, is cut as conversations are.
    """
    context, found = given.get("context_parallel_size", 1), asked(given)
    return math.lcm(
        context * _sequence_parallel(given) * (found[2].block if found else 1),
        document_multiple(given),
    )


def check_pack(given: Mapping[str, Any]) -> None:
    """Raise UserError where a pack does not divide; the message names lengths that do.

    given: the flags on the command line, by destination; --sequence-parallel as the run will have
        it.
    """
    length, multiple = given["seq_length"], pack_multiple(given)
    if length % multiple == 0:
        return
    context, tensor, found = (
        given.get("context_parallel_size", 1),
        _sequence_parallel(given),
        asked(given),
    )
    wanted = given.get(destination("document_multiple"), 0)
    reasons = [
        f"--context-parallel-size {context}" if context > 1 else "",
        f"--sequence-parallel over {tensor} ranks" if tensor > 1 else "",
        f"{found[1]}'s blocks of {found[2].block} tokens" if found else "",
        f"--tsft-document-multiple {wanted}" if wanted else "",
    ]
    below = length // multiple * multiple
    fit = f"{below} or {below + multiple}" if below else f"{multiple}"
    raise UserError(
        f"--seq-length {length} is not a multiple of {multiple}, which"
        f" {' with '.join(filter(None, reasons))} asks for:"
        f" pass {fit}"
    )


def _sequence_parallel(given: Mapping[str, Any]) -> int:
    """Over how many tensor-parallel ranks a pack's tokens are cut."""
    return given.get("tensor_model_parallel_size", 1) if given.get("sequence_parallel") else 1
