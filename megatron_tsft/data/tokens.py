"""A tokenised text: which tokens lie over which characters, and which of them ends a turn."""

import bisect
from typing import Any

import numpy as np

from megatron_tsft.data.turns import Turn


class Tokens:
    """A tokenised text; characters are asked for one at a time, because a list of all offsets takes
    longer than the tokenising."""

    def __init__(self, encoding: Any, special: np.ndarray) -> None:
        """special: [largest id + 1] bool."""
        self.ids = np.array(encoding.ids, np.int32)  # [n]
        self._encoding = encoding
        self._length = len(self.ids)
        # the special tokens of the text, and the characters that they begin at
        self.special_places: list[int] = np.flatnonzero(special[self.ids]).tolist()
        self.special_starts = [self.span(place)[0] for place in self.special_places]

    def append(self, token: int) -> None:
        """A token behind the text."""
        self.ids = np.append(self.ids, np.int32(token))

    def span(self, token: int) -> tuple[int, int]:
        """The characters [start, end) of a token."""
        return self._encoding.token_to_chars(token)

    def overlap(self, start: int, stop: int) -> slice:
        """The tokens that share a character with [start, stop)."""
        for at in range(start, stop):  # a tokenizer may drop characters
            first = self._encoding.char_to_token(at)
            if first is not None:
                break
        else:
            return slice(0, 0)
        last = first
        while last < self._length and self.span(last)[0] < stop:
            last = self._after(last, stop)
        return slice(first, last)

    def _after(self, token: int, stop: int) -> int:
        """A later token that is not behind the first one that begins at or after `stop`."""
        if token + 1 >= self._length or self.span(token + 1)[0] >= stop:
            return token + 1
        near = self._encoding.char_to_token(stop - 1)
        return max(token + 1, near if near is not None else 0)


def end_token(text: str, tokens: Tokens, turn: Turn) -> int | None:
    """Which special token ends a turn: nothing but white space lies between it and the stop; it may
    stand behind the stop, where it is the next role's, but not the one that a turn begins with."""
    places, starts = tokens.special_places, tokens.special_starts
    behind = bisect.bisect_left(starts, turn.stop)
    follows = behind < len(places) and starts[behind] == turn.stop
    if bisect.bisect_left(starts, turn.start) < behind and not (turn.cut and follows):
        last = places[behind - 1]
        if not text[tokens.span(last)[1] : turn.stop].strip():
            return last
    if behind < len(places) and not text[turn.stop : starts[behind]].strip():
        own = bisect.bisect_left(starts, turn.written)
        begins = starts[own] == turn.written
        if not (begins and tokens.ids[places[behind]] == tokens.ids[places[own]]):
            return places[behind]
    return None
