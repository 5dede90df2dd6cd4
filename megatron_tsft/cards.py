"""A card: a dataclass saved as JSON beside what it describes, with the version of its format and a
checksum, because most of what it says shows in nothing else."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from megatron_tsft.atomic import write_text
from megatron_tsft.errors import UserError
from megatron_tsft.plain_json import read_object
from megatron_tsft.typed import shown, typed


def load_card[Card](
    kind: type[Card], path: Path, version: int, *, what: str, missing: str, again: str
) -> Card:
    """Read a card of type `kind`; every field has the type of its annotation.

    Args:
        what: its name in messages, such as "model card".
        missing: the whole message where there is no file.
        again: what makes a new one.

    Raises:
        UserError: there is none, it was written by another version, a field is of another type, or
            it is not what was written. (Earlier cards have no checksum.)
    """
    if not path.is_file():
        raise UserError(missing)
    values = read_object(path, again)
    try:
        if (found := values.pop("format_version", None)) != version or type(found) is not int:
            raise ValueError(f"format version {shown(found)}, not {version}")
        said = values.pop("checksum", None)
        card = typed(values, kind, "")
    except ValueError as error:
        raise UserError(f"{path} is not a {what} of this version ({error}): {again}") from error
    if said is not None and said != _checksum(values):
        raise UserError(f"{path} is damaged (its checksum differs): {again}")
    return card


def save_card(card: Any, path: Path, version: int) -> None:
    """Write a card, atomically; last, because a folder with a card is complete."""
    values = dataclasses.asdict(card)
    whole = {"format_version": version} | values | {"checksum": _checksum(values)}
    write_text(path, json.dumps(whole, indent=2) + "\n")


def _checksum(values: dict[str, Any]) -> str:
    """32 hex digits over a card's fields, in whichever order and with whichever blanks."""
    text = json.dumps(values, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
