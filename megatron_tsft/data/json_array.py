"""The values of a JSON array, one by one, however long it is."""

import codecs
import json
from collections.abc import Callable, Iterator
from typing import Any

CHARACTERS = 1 << 20  # read at once, at least
BLANK = " \t\n\r"


def array_values(read: Callable[[int], bytes]) -> Iterator[Any]:
    """The values, each as soon as it is whole.

    Args:
        read: the next so many bytes of UTF-8 text, fewer or none at the end.

    Raises:
        ValueError: the text is not one JSON array, by what is wrong and the character it begins at.
    """
    text = _Text(read)
    if text.next_character() != "[":
        raise text.error("an array begins with [")
    text.skip()
    if text.next_character() == "]":
        text.skip()
    else:
        while True:
            yield text.value()
            mark = text.next_character()
            text.skip()
            if mark == "]":
                break
            if mark != ",":
                raise text.error("a value is followed by , or ]")
    if text.next_character():
        raise text.error("something follows the array")


class _Text:
    """What of the text is not yet taken."""

    def __init__(self, read: Callable[[int], bytes]) -> None:
        self._read, self._decoder = read, json.JSONDecoder()
        self._characters = codecs.getincrementaldecoder("utf-8-sig")()
        self._held, self._at, self._before, self._ended = "", 0, 0, False

    def error(self, what: str) -> ValueError:
        return ValueError(f"no JSON at character {self._before + self._at}: {what}")

    def _more(self) -> bool:
        """Hold more of the text, twice as much as is waited for; False at its end."""
        if self._ended:
            return False
        data = self._read(max(CHARACTERS, len(self._held) - self._at))
        self._ended = not data
        self._before += self._at
        self._held = self._held[self._at :] + self._characters.decode(data, final=self._ended)
        self._at = 0
        return True

    def next_character(self) -> str:
        """The next one that is not blank, which is not taken; "" at the end."""
        while True:
            while self._at < len(self._held):
                if self._held[self._at] not in BLANK:
                    return self._held[self._at]
                self._at += 1
            if not self._more():
                return ""

    def skip(self) -> None:
        """Take a character."""
        self._at += 1

    def value(self) -> Any:
        """Take a value."""
        self.next_character()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._held, self._at)
            except json.JSONDecodeError as error:
                if self._more():
                    continue
                raise ValueError(
                    f"no JSON at character {self._before + error.pos}: {error.msg}"
                ) from error
            behind = self._held[end : end + 1]
            if (not behind or behind not in BLANK + ",]") and self._more():
                continue  # a number may go on
            self._at = end
            return value
