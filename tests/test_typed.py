"""What JSON may say where a program counts on it: types, ranges, texts that are no plain JSON."""

import dataclasses
import json
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import pytest

from megatron_tsft.cards import load_card, save_card
from megatron_tsft.errors import UserError
from megatron_tsft.plain_json import DEEPEST, parse, read_json, read_object
from megatron_tsft.typed import Count, Dtype, Misfit, Parts, Positive, typed


class Size(TypedDict):
    width: Count
    scale: NotRequired[Positive]


@dataclasses.dataclass(frozen=True)
class Thing:
    name: str
    size: Size
    of: tuple[int, str] = (0, "")
    places: list[int | str] = dataclasses.field(default_factory=list)


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (int, [0, 7, 2**63 - 1], [-1, 2**63, True, 5.0, "5", None, [5]]),
        (Count, [1, 10**7], [0, -1, True, 1.0]),
        (Parts, [1, 100_000], [0, 10**7]),
        (float, [0, -1, 0.5], [True, "0.5", None, 10**30]),
        (Positive, [1e-6, 1], [0, 0.0, -1e-6, False]),
        (Dtype, ["bfloat16"], ["int8", 16, None]),
        (bool, [True], [1, 0, "true", None]),
        (str | None, ["", None], [0, False, []]),
        (list[int], [[], [1, 2]], [{}, [1, "2"], "12"]),
        (tuple[int, str], [], [[1], [1, 2], [1, "a", "b"], {}]),
        (dict[str, int], [{}, {"a": 1}], [[], {"a": 1.5}, None]),
        (Size, [{"width": 1}, {"width": 1, "scale": 2}], [{}, {"width": 1, "depth": 1}, 1]),
    ],
)
def test_values_and_the_types_that_they_have(kind: Any, good: list[Any], bad: list[Any]) -> None:
    for value in good:
        assert typed(value, kind, "it") == value
    for value in bad:
        with pytest.raises(Misfit, match="^it.*: it must be "):
            typed(value, kind, "it")


def test_a_misfit_is_named_by_its_place_and_in_few_words() -> None:
    whole = {"name": "a", "size": {"width": 2}, "of": [1, "b"], "places": [3, "c:4"]}
    assert typed(whole, Thing, "") == Thing("a", {"width": 2}, (1, "b"), [3, "c:4"])
    for change, message in (
        ({"size": {"width": 0}}, "size.width=0: it must be a whole number from 1 on"),
        ({"places": [1, None]}, "places=[1, None]: it must be a list"),
        ({"of": [1]}, "of=[1]: it must be a list of 2"),
        ({"flavour": "mint"}, "flavour='mint': it must be left out, nothing of that name is known"),
        ({"name": None}, "name=None: it must be text"),
    ):
        with pytest.raises(Misfit) as refused:
            typed(whole | change, Thing, "")
        assert str(refused.value).startswith(message.split("=")[0])
    with pytest.raises(Misfit, match="^name=None: it must be there, text$"):
        typed({"size": {"width": 2}}, Thing, "")
    with pytest.raises(Misfit) as refused:
        typed({"name": list(range(1000)), "size": {"width": 2}}, Thing, "")
    assert len(str(refused.value)) < 150


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"\xff\xfe{}", "utf-8"),
        (b"{", "Expecting"),
        (b'{"a": NaN}', "NaN is no number"),
        (b'{"a": -Infinity}', "-Infinity is no number"),
        (b'{"a": 1e999}', "1e999 is too large a number"),
        (b'{"a": ' + b"9" * 100_000 + b"}", r"9\.\.\. is too large a number"),
        (b'{"a": 1, "a": 2}', "the key 'a' is there twice"),
        (b'{"a": "\\ud800"}', "surrogates not allowed"),
        (b"[" * 100_000, "nested too deep"),
        (b"[" * (DEEPEST + 1) + b"]" * (DEEPEST + 1), "nested too deep"),
        (b'{"a":' * 500 + b"1" + b"}" * 500, "nested too deep"),
    ],
)
def test_texts_that_are_refused(text: bytes, words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        parse(text)
    (tmp_path / "it.json").write_bytes(text)
    with pytest.raises(UserError, match=r"it\.json is damaged \(.*\): copy it again") as refused:
        read_object(tmp_path / "it.json", "copy it again")
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 400


def test_texts_that_are_read(tmp_path: Path) -> None:
    assert parse('{"a": ["\\ud83d\\ude42", 1e-5, -3, null]}') == {"a": ["🙂", 1e-5, -3, None]}
    assert parse(b"[" * DEEPEST + b"]" * DEEPEST)
    (tmp_path / "it.json").write_text("[1]")
    assert read_json(tmp_path / "it.json", list) == [1]
    with pytest.raises(UserError, match="it holds list, not an object"):
        read_object(tmp_path / "it.json", "copy it again")
    with pytest.raises(UserError, match=r"is damaged \(.*No such file"):
        read_object(tmp_path / "other.json", "copy it again")


def test_a_card_is_what_was_written(tmp_path: Path) -> None:
    path, thing = tmp_path / "thing.json", Thing("a", {"width": 2}, (1, "b"), [3, "c:4"])
    save_card(thing, path, 1)

    def load() -> Thing:
        return load_card(Thing, path, 1, what="card", missing="none", again="make it again")

    assert load() == thing
    values = json.loads(path.read_text())
    path.write_text(json.dumps(dict(reversed(values.items()))))  # the same, written otherwise
    assert load() == thing
    path.write_text(json.dumps(values | {"of": [2, "b"]}))
    with pytest.raises(UserError, match="its checksum differs.*: make it again"):
        load()
    for change, words in (
        ({"format_version": True}, "format version True, not 1"),
        ({"size": {"width": 1.5}}, r"size.width=1.5: it must be a whole number from 1 on"),
        ({"checksum": 1}, "its checksum differs"),
    ):
        path.write_text(json.dumps(values | change))
        with pytest.raises(UserError, match=words):
            load()
    del values["checksum"]
    path.write_text(json.dumps(values))  # as earlier versions wrote it
    assert load() == thing
