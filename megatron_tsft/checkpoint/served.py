"""How a model is served after training: which tokens end its turns, and its chat template. The data
knows both; a run's folder keeps them, and an export writes them where servers look.

A tuned base model would never stop otherwise: its generation_config.json names the end of a text,
and the data taught it the end of a turn.
"""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from megatron_tsft.atomic import write_text
from megatron_tsft.cards import load_card, save_card
from megatron_tsft.checkpoint.card import CARD_FILE, SERVED_FILE, list_around
from megatron_tsft.errors import UserError
from megatron_tsft.plain_json import read_object
from megatron_tsft.typed import Misfit, typed

FORMAT_VERSION = 1
RARE = 0.01  # what ends fewer of a data set's conversations is no habit of it


class Taught(Protocol):
    """What a data set's card says of it (data/prepared.py)."""

    @property
    def conversations(self) -> int: ...

    @property
    def turn_ends(self) -> dict[str, tuple[int, int]]: ...

    @property
    def chat_template(self) -> str | None: ...


@dataclass(frozen=True)
class Served:
    """Attributes:
    stops: tokens that end a turn in the data -> their ids.
    chat_template: Jinja text that wrote the data; None where no template did, or several.
    """

    stops: dict[str, int] = field(default_factory=dict[str, int])
    chat_template: str | None = None

    @staticmethod
    def by(cards: Iterable[Taught]) -> "Served":
        """What a run on these data sets teaches."""
        stops: dict[str, int] = {}
        templates: set[str] = set()
        for card in cards:
            for token, (number, count) in card.turn_ends.items():
                if count >= RARE * card.conversations:
                    stops[token] = number
            if card.chat_template is not None:
                templates.add(card.chat_template)
        return Served(stops, templates.pop() if len(templates) == 1 else None)

    @staticmethod
    def load(folder: Path | str) -> "Served | None":
        """What a run's folder keeps; None for an import. Raises UserError: another version."""
        path = Path(folder) / SERVED_FILE
        if not os.path.lexists(path):
            return None
        again = "train on with this version, or delete it"
        return load_card(
            Served,
            path,
            FORMAT_VERSION,
            what="card of a served model",
            missing=f"{path} is no file: {again}",
            again=again,
        )

    def save(self, folder: Path | str) -> None:
        """Write it into a run's folder, atomically, and list it there: an export that found none
        would never stop. Call it on one rank."""
        folder = Path(folder)
        listed = (folder / CARD_FILE).is_file()
        if listed:  # a kill leaves no list of what this file was
            list_around(folder, but=SERVED_FILE)
        save_card(self, folder / SERVED_FILE, FORMAT_VERSION)
        if listed:
            list_around(folder)

    def unknown_stops(self, hf: Path) -> dict[str, int]:
        """The stops that a Hugging Face folder does not know."""
        known = _known_stops(hf)
        return {token: number for token, number in self.stops.items() if number not in known}

    def write_into(self, hf: Path) -> None:
        """Make a Hugging Face folder stop where the data does, and write as the data is written."""
        if unknown := self.unknown_stops(hf):
            path = hf / "generation_config.json"
            values = _read(path)
            values["eos_token_id"] = [*unknown.values(), *_known_stops(hf)]
            # transformers makes a file with this mark anew from config.json
            values.pop("_from_model_config", None)
            write_text(path, json.dumps(values, indent=2) + "\n")
        path = hf / "chat_template.jinja"
        own = path.read_bytes().decode(errors="replace") if path.is_file() else None
        own = own or _read(hf / "tokenizer_config.json").get("chat_template") or ""
        if self.chat_template is not None and str(own).rstrip() != self.chat_template.rstrip():
            write_text(path, self.chat_template)


def _known_stops(hf: Path) -> list[int]:
    """Where a Hugging Face folder stops."""
    return _stops(hf / "generation_config.json") or _stops(hf / "config.json")


def _read(path: Path) -> dict[str, Any]:
    """Raises UserError: the file is damaged."""
    return read_object(path, "copy the folder again") if path.is_file() else {}


def _stops(path: Path) -> list[int]:
    """eos_token_id as a list. Raises UserError: the file is damaged, or it is something else."""
    try:
        found = typed(_read(path).get("eos_token_id"), list[int] | int | None, "eos_token_id")
    except Misfit as error:
        raise UserError(f"{path} is damaged ({error}): copy the folder again") from error
    return [] if found is None else found if isinstance(found, list) else [found]
