"""What may happen to a file: one fault a case, in one file, drawn by a seed."""

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# what stands in a text where JSON has no value for it
RAW = {
    "@deep@": "[" * 50_000 + "]" * 50_000,
    "@deeper@": '{"a":' * 3000 + "1" + "}" * 3000,
    "@long@": "9" * 6000,
    "@huge@": "1e999",
    "@half@": '"\\ud800"',
    "@nul@": '"a\\u0000b"',
}
# values that some program may have written, or nobody
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 5.5, -1e-5, 1e-30, 10**7, 2**31, 2**63, 10**30, 1e308),
    *(float("nan"), float("inf"), "", "x", "0", "../x", "/", "a\nb", "\U0001f642", "é" * 300),
    *([], {}, [None], [[]], {"": 0}, [1, "a"], *RAW),
)
NOISE = (1, 2, 8, 64, 1000)  # bytes that are changed together


def damage(folder: Path, draw: random.Random) -> str:
    """Change one file below a folder; says what was done."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    # the large ones are not more interesting than the small ones that say what they are
    path = draw.choice(files)
    name = path.relative_to(folder).as_posix()
    document = _document(path)
    if document is not None and draw.random() < 0.7:
        return f"{name}: {_edit_json(path, document, draw)}"
    ways: list[Callable[[Path, random.Random], str]] = [_flip] * 4 + [_overwrite] * 3
    ways += [_cut, _cut, _insert, _remove, _repeat, _number, _number, _empty, _delete, _folder]
    if draw.random() < 0.04:
        return f"{name}: {_take_place(path, draw.choice(files), draw)}"
    return f"{name}: {draw.choice(ways)(path, draw)}"


# ---- of any file
def _flip(path: Path, draw: random.Random) -> str:
    content = bytearray(path.read_bytes())
    if not content:
        return _insert(path, draw)
    at, bit = draw.randrange(len(content)), draw.randrange(8)
    content[at] ^= 1 << bit
    path.write_bytes(content)
    return f"bit {bit} of byte {at} flipped"


def _overwrite(path: Path, draw: random.Random) -> str:
    content, count = bytearray(path.read_bytes()), draw.choice(NOISE)
    at = draw.randrange(len(content) + 1)
    filler = draw.choice((b"\0", b"\xff", None))
    content[at : at + count] = draw.randbytes(count) if filler is None else filler * count
    path.write_bytes(content)
    return f"{count} bytes from {at} overwritten with {filler!r}"


def _number(path: Path, draw: random.Random) -> str:
    """Where a length or an offset may stand."""
    content, size = bytearray(path.read_bytes()), draw.choice((4, 8))
    at = draw.randrange(max(len(content) - size, 0) + 1)
    value = draw.choice((0, 1, 2**16, 2**30, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1))
    content[at : at + size] = (value % 2 ** (8 * size)).to_bytes(size, "little")
    path.write_bytes(content)
    return f"{size} bytes from {at} are the number {value}"


def _insert(path: Path, draw: random.Random) -> str:
    content, count = path.read_bytes(), draw.choice(NOISE)
    at = draw.randrange(len(content) + 1)
    path.write_bytes(content[:at] + draw.randbytes(count) + content[at:])
    return f"{count} bytes inserted at {at}"


def _remove(path: Path, draw: random.Random) -> str:
    content, count = path.read_bytes(), draw.choice(NOISE)
    at = draw.randrange(len(content) + 1)
    path.write_bytes(content[:at] + content[at + count :])
    return f"{count} bytes removed at {at}"


def _repeat(path: Path, draw: random.Random) -> str:
    content, count = path.read_bytes(), draw.choice(NOISE)
    at = draw.randrange(len(content) + 1)
    path.write_bytes(content[: at + count] + content[at:])
    return f"{count} bytes at {at} are there twice"


def _cut(path: Path, draw: random.Random) -> str:
    size = draw.randrange(path.stat().st_size + 1)
    os.truncate(path, size)
    return f"cut at byte {size}"


def _empty(path: Path, draw: random.Random) -> str:
    path.write_bytes(draw.choice((b"", b"\n", b"\0", b"\xef\xbb\xbf", b"null", b"\xff\xfe")))
    return f"holds {path.read_bytes()!r}"


def _delete(path: Path, _: random.Random) -> str:
    path.unlink()
    return "deleted"


def _folder(path: Path, _: random.Random) -> str:
    path.unlink()
    path.mkdir()
    return "is a folder"


def _take_place(path: Path, other: Path, draw: random.Random) -> str:
    if path != other and draw.random() < 0.7:
        shutil.copyfile(other, path)
        return f"is {other.name}"
    path.unlink()
    path.symlink_to(draw.choice(("nowhere", path.name, "/dev/zero", "/etc/passwd", "..")))
    return f"is a link to {os.readlink(path)}"


# ---- of JSON
def _document(path: Path) -> Any:
    """What a JSON file holds, or a JSONL file's rows; None for another file."""
    if path.suffix not in (".json", ".jsonl"):
        return None
    text = path.read_text(encoding="utf-8")
    return (
        [json.loads(row) for row in text.splitlines()]
        if path.suffix == ".jsonl"
        else json.loads(text)
    )


def _holders(value: Any, name: str = "") -> Iterator[tuple[Any, Any, str]]:
    """(object or list, key, name) of every value in a document."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in list(pairs):
        yield value, key, f"{name}/{key}"
        if isinstance(item, dict | list):
            yield from _holders(item, f"{name}/{key}")


def _edit_json(path: Path, document: Any, draw: random.Random) -> str:
    places = list(_holders(document))
    if len(places) > 400:  # a vocabulary's; its first values say what kind it is
        few = [place for place in places if place[2].count("/") < 3]
        places = few if draw.random() < 0.7 else places
    holder, key, name = draw.choice(places)
    old, way = holder[key], draw.random()
    twice = None
    if way < 0.55:
        holder[key] = draw.choice(VALUES)
        done = f"{name} is {holder[key]!r:.40}"
    elif way < 0.7:
        holder[key] = _near(old, draw)
        done = f"{name} is {holder[key]!r:.40}"
    elif way < 0.8 or isinstance(holder, list):
        del holder[key]
        done = f"{name} is gone"
    elif way < 0.87:
        holder[draw.choice((key + "s", key.upper() + "_", "", "weight", "x" * 300))] = holder.pop(
            key
        )
        done = f"{name} has another name"
    elif way < 0.94:
        holder[draw.choice(("unknown", "checksum_", "a b", "loss"))] = draw.choice(VALUES)
        done = f"a value beside {name}"
    else:
        twice, done = key, f"{name} is there twice"
        holder[f"@twice@{key}"] = draw.choice(VALUES)
    text = _written(path, document)
    if twice is not None:
        text = text.replace("@twice@", "")
    path.write_text(text, encoding="utf-8")
    return done


def _near(old: Any, draw: random.Random) -> Any:
    """A value that is almost the one that was there."""
    if isinstance(old, bool) or old is None:
        return draw.choice((not old, int(bool(old)), str(old)))
    if isinstance(old, int | float):
        return draw.choice((old + 1, -old, old * 2, float(old), str(old), [old], old / 2))
    if isinstance(old, str):
        return draw.choice((old + "x", old[1:], old.upper(), [old], old * 2, old.encode().hex()))
    if isinstance(old, list):
        return draw.choice((old[1:], old * 2, old[::-1], {"0": old}, [old], list(map(str, old))))
    return draw.choice((list(old), list(old.values()), [old], str(old)))


def _written(path: Path, document: Any) -> str:
    """The text of a document as the file had it, with what JSON has no value for."""
    rows = document if path.suffix == ".jsonl" else [document]
    text = "\n".join(json.dumps(row) for row in rows) + "\n"
    for word, raw in RAW.items():
        text = text.replace(f'"{word}"', raw)
    return text
