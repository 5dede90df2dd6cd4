"""What each token of a conversation says, exactly, and which stretches of it are learnt and how
much."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_tsft.data.prepared import Sample

BROKEN = "\ufffd"  # what a decoder writes for a part of a character


class TokenTexts:
    """Tokens -> text, with one tokenizer. Decoders cut a space off what comes first
    (sentencepiece), so a token stands before what is asked for."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._anchor: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"]
        self._before = len(self._decoded(self._anchor))
        self._known: dict[int, str] = {}

    def _decoded(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, clean_up_tokenization_spaces=False)

    def whole(self, ids: Sequence[int]) -> str:
        """The text of some tokens [n]."""
        return self._decoded([*self._anchor, *ids])[self._before :] if len(ids) else ""

    def each(self, ids: Sequence[int]) -> list[str]:
        """[n] the text of each token; a part of a character as the vocabulary spells it."""
        for token in set(ids) - self._known.keys():
            text = self.whole([token])
            if not text or BROKEN in text:
                text = f"⟨{self._tokenizer.convert_ids_to_tokens(token)}⟩"
            self._known[token] = text
        return [self._known[token] for token in ids]


@dataclass(frozen=True)
class Stretch:
    """Tokens [start, stop) that are learnt alike.

    weight: of each, None where they are not supervised.
    """

    start: int
    stop: int
    weight: float | None


def stretches(sample: Sample) -> list[Stretch]:
    """A conversation of n > 0 tokens as stretches, from the first token to the last."""
    mask, weights = sample.loss_mask, sample.token_weights
    weights = np.ones(len(mask), np.float32) if weights is None else weights
    value = np.where(mask, weights, np.float32(np.nan))
    same = (value[1:] == value[:-1]) | (~mask[1:] & ~mask[:-1])
    borders = [0, *(np.flatnonzero(~same) + 1).tolist(), len(mask)]
    return [
        Stretch(start, stop, float(value[start]) if mask[start] else None)
        for start, stop in zip(borders, borders[1:], strict=False)
    ]


def mark_supervised(tokenizer: Any, input_ids: np.ndarray, loss_mask: np.ndarray) -> str:
    """The text of a conversation [n] with its supervised parts in [[...]]."""
    texts, sample = TokenTexts(tokenizer), Sample("", input_ids, loss_mask, None)
    pieces = []
    for part in stretches(sample) if len(input_ids) else []:
        text = texts.whole(input_ids[part.start : part.stop].tolist())
        pieces.append(text if part.weight is None else f"[[{text}]]")
    return "".join(pieces)
