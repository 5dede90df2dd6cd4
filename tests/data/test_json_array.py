"""A JSON array read in parts is what `json` reads at once, wherever the parts end."""

import io
import json
import random
from typing import Any

import pytest

from megatron_tsft.data import json_array
from megatron_tsft.data.json_array import array_values


def value(g: random.Random, depth: int) -> Any:
    kinds = ["text", "number", "float", "none", "bool"] + ["list", "object"] * (depth > 0)
    match g.choice(kinds):
        case "text":
            return "".join(g.choices('a"\\,]}[{ é😀\n', k=g.randint(0, 6)))
        case "number":
            return g.randint(-(10 ** g.randint(0, 12)), 10**6)
        case "float":
            return g.random() * 10 ** g.randint(-9, 9)
        case "none":
            return None
        case "bool":
            return g.random() < 0.5
        case "list":
            return [value(g, depth - 1) for _ in range(g.randint(0, 3))]
        case _:
            return {str(i): value(g, depth - 1) for i in range(g.randint(0, 3))}


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1 << 20])
def test_it_is_what_json_reads(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_array, "CHARACTERS", size)
    g = random.Random(size)
    for number in range(60):
        values = [value(g, 2) for _ in range(g.randint(0, 5))]
        text = json.dumps(values, ensure_ascii=number % 2 == 0, indent=g.choice([None, 1]))
        text = (" \n" * (number % 3) + text + "\n" * (number % 2)).encode()
        found = list(array_values(io.BytesIO(text).read))
        assert found == values and list(map(type, found)) == list(map(type, values))


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{}",
        b"[",
        b"[1",
        b"[1,",
        b"[1,]",
        b"[1 2]",
        b"[1]]",
        b"[1] x",
        b'["a',
        b"[tru]",
        b"\xff",
        b"[1.]",
        b"[1e]",
    ],
)
@pytest.mark.parametrize("size", [1, 1 << 20])
def test_what_is_no_array(text: bytes, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_array, "CHARACTERS", size)
    with pytest.raises(ValueError):
        list(array_values(io.BytesIO(text).read))


def test_a_value_comes_before_the_text_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_array, "CHARACTERS", 8)
    text = io.BytesIO(json.dumps([{"a": i} for i in range(1000)]).encode())
    assert next(array_values(text.read)) == {"a": 0} and text.tell() < 50
