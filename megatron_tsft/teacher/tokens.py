"""Does a teacher mean the same tokens? By the tokenizer's fingerprint, or by the user's map."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_tsft.data.prepared import PreparedData
from megatron_tsft.errors import UserError
from megatron_tsft.plain_json import read_json


def check_same_tokenizer(
    teacher: str, theirs: str | None, data: Sequence[PreparedData], remedy: str
) -> None:
    """Raise UserError, which ends in `remedy`, where the teacher has another tokenizer."""
    for part in data:
        if theirs is None or theirs != part.card.tokenizer_fingerprint:
            tokenizer = (
                "no tokenizer" if theirs is None else f"another tokenizer (fingerprint {theirs})"
            )
            raise UserError(
                f"the teacher {teacher} has {tokenizer}, but {part.directory} was prepared with"
                f" {part.card.tokenizer_fingerprint}; its predictions are about other tokens:"
                f" use a teacher of the student's family, or {remedy}"
            )


def token_map_hash(token_map: Sequence[int]) -> str:
    """16 hex digits over a token map."""
    return hashlib.sha256(repr(list(token_map)).encode()).hexdigest()[:16]


def read_token_map(
    file: str, students: int, teachers: int, data: Sequence[PreparedData]
) -> list[int]:
    """[students] the teacher's id of each of the student's tokens, -1 where it has none.

    Args:
        file: a JSON list; a short one means -1 for the rest.
        students, teachers: sizes of the vocabularies.
        data: whose tokens must all have a counterpart.

    Raises:
        UserError: no JSON list of the teacher's ids, too long, an id twice, or a token of the data
            without counterpart.
    """
    what = f"token map {file}"
    try:
        values = read_json(Path(file), list)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{what} cannot be read ({error}): pass a JSON list, the teacher's id of each token"
        ) from error
    if not all(type(v) is int and -1 <= v < teachers for v in values):
        raise UserError(
            f"{what} must be a JSON list of the teacher's ids, each from -1 (none) to"
            f" {teachers - 1}"
        )
    if len(values) > students:
        raise UserError(
            f"{what} has {len(values)} entries, the student's vocabulary {students}: make them"
            " agree"
        )
    ids, counts = np.unique([v for v in values if v >= 0], return_counts=True)
    if (counts > 1).any():  # their mass would count twice
        raise UserError(
            f"{what} names the teacher's token {int(ids[counts > 1][0])} twice: give it one"
            " counterpart"
        )
    values += [-1] * (students - len(values))
    known = np.array(values) >= 0
    for part in data:
        used = np.flatnonzero(part.used_tokens())
        lost = used[(used >= students) | ~known[np.minimum(used, students - 1)]]
        if len(lost):
            raise UserError(
                f"{what} has no counterpart of token {int(lost[0])}, which {part.directory} uses:"
                " add it"
            )
    return values
