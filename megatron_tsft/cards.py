"""A card: a dataclass saved as JSON beside what it describes, with the version of its format."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from megatron_tsft.atomic import write_text
from megatron_tsft.errors import UserError


def load_card[Card](
    kind: type[Card], path: Path, version: int, *, what: str, missing: str, again: str
) -> Card:
    """Read a card of type `kind`.

    Args:
        what: its name in messages, such as "model card".
        missing: the whole message where there is no file.
        again: what makes a new one.

    Raises:
        UserError: there is none, or it was written by another version.
    """
    if not path.is_file():
        raise UserError(missing)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if (found := values.pop("format_version")) != version:
            raise ValueError(f"format version {found}, not {version}")
        return kind(**values)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a {what} of this version ({error}): {again}") from error


def save_card(card: Any, path: Path, version: int) -> None:
    """Write a card, atomically; last, because a folder with a card is complete."""
    values = {"format_version": version} | dataclasses.asdict(card)
    write_text(path, json.dumps(values, indent=2) + "\n")
