"""JSON that somebody else may have written: text in UTF-8, finite numbers, no depth without end."""

import json
import math
import stat
from pathlib import Path
from typing import Any

from megatron_tsft.errors import UserError

LARGEST = 1 << 28  # bytes; the index of a hundred thousand tensors has a twentieth of it
DIGITS = 400  # of a whole number; what has more is read in quadratic time
DEEPEST = 64  # lists in lists; what others make of them (repr, copies, json) calls itself


def parse(text: bytes | str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is none, or holds what no program of ours writes: bytes that are not UTF-8,
            half a character, NaN, an infinite number, a key twice, lists without end.
    """
    if isinstance(text, bytes):
        text = text.decode("utf-8")
    try:
        value = json.loads(
            text,
            parse_constant=_refuse,
            parse_float=_finite,
            parse_int=_whole,
            object_pairs_hook=_once,
        )
        check_depth(value)
    except RecursionError as error:
        raise ValueError("its lists or objects are nested too deep") from error
    if "\\u" in text:  # half a character can only be written so
        check_characters(value)
    return value


def check_characters(value: Any) -> None:
    """Raise ValueError where a text has half a character, which nobody can print or write."""
    json.dumps(value, ensure_ascii=False).encode("utf-8")


def read_json(path: Path, kind: type = dict) -> Any:
    """The object (or, with kind=list, the list) that a file holds.

    Raises:
        ValueError: the file is not what `parse` takes, or holds something else.
        OSError: it cannot be read.
    """
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise ValueError("it is no file")
    if found.st_size > LARGEST:
        raise ValueError(f"it has {found.st_size} bytes, more than any such file")
    value = parse(path.read_bytes())
    if not isinstance(value, kind):
        wanted = "a list" if kind is list else "an object"
        raise ValueError(f"it holds {type(value).__name__}, not {wanted}")
    return value


def read_object(path: Path, remedy: str) -> dict[str, Any]:
    """The object that a file holds; `remedy` is what to do where it holds none.

    Raises:
        UserError: by name, the file is not what `read_json` takes.
    """
    try:
        return read_json(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}): {remedy}") from error


def check_depth(value: Any) -> None:
    """Raise ValueError where lists and objects are nested too deep for what calls itself for each
    level."""
    level = [value]
    for _ in range(DEEPEST + 1):
        holders = [child for child in level if isinstance(child, dict | list)]
        if not holders:
            return
        level = [
            child
            for holder in holders
            for child in (holder.values() if isinstance(holder, dict) else holder)
        ]
    raise ValueError("its lists or objects are nested too deep")


def _refuse(word: str) -> Any:
    raise ValueError(f"{word} is no number")


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"{digits[:40]} is too large a number")
    return value


def _whole(digits: str) -> int:
    if len(digits) > DIGITS:
        raise ValueError(f"{digits[:40]}... is too large a number")
    return int(digits)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"the key {twice!r} is there twice")
    return found
