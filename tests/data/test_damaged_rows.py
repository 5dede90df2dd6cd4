"""Rows that dev/fuzz.py made and that ended a preparation: each is refused by name now, and the
others are prepared."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_tsft.data.encoding import Encoding
from megatron_tsft.data.prepare import prepare
from megatron_tsft.data.rows import _call
from megatron_tsft.errors import UserError
from tests.data.chat_tokenizers import assistant, byte_level, user

HALF = (
    '{"messages": [{"role": "user", "content": "a\\ud800"}, {"role": "assistant", "content": "b"}]}'
)
DEEP = '{"messages": ' + "[" * 5000 + "]" * 5000 + "}"
DEEPER_THAN_TOOLS = json.dumps(
    {"prompt": "a", "completion": "b", "x": json.loads("[" * 200 + "]" * 200)}
)


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    byte_level().save_pretrained(str(tmp_path / "tokenizer"))
    return tmp_path / "tokenizer"


def alpaca(**change: Any) -> str:
    return json.dumps({"instruction": "add", "input": "1", "output": "2"} | change)


def sharegpt(speaker: Any) -> str:
    return json.dumps({"conversations": [{"from": speaker, "value": "a"}]})


@pytest.mark.parametrize("suffix", ["jsonl", "json"])
@pytest.mark.parametrize(
    ("kind", "row", "reason"),
    [
        ("messages", HALF, "bad JSON"),
        ("messages", DEEPER_THAN_TOOLS, "bad JSON"),
        ("alpaca", alpaca(instruction=1.5), "`instruction` is not text"),
        ("alpaca", alpaca(input=10**30), "`input` is not text"),
        ("alpaca", alpaca(history=7), "`history` is not a list of [question, answer]"),
        ("sharegpt", sharegpt([1]), "`from` is '[1]', none of"),
        ("sharegpt", sharegpt({"a": "\ud800"}), "bad JSON"),
    ],
)
def test_a_row_is_refused_and_the_others_stay(
    kind: str, row: str, reason: str, suffix: str, tokenizer: Path, tmp_path: Path
) -> None:
    good = json.dumps({"messages": [user("one plus two?"), assistant("three")]})
    lines = [good, row, good]
    text = "\n".join(lines) if suffix == "jsonl" else f"[{', '.join(lines)}]"
    (tmp_path / f"in.{suffix}").write_text(text)
    card = prepare(
        tmp_path / f"in.{suffix}",
        tokenizer,
        tmp_path / "out",
        max_refused=0.5,
        encoding=Encoding(format=kind),
        progress=False,
    )
    assert card.conversations == 2
    (found,) = card.refused
    assert found.startswith(reason) and card.refused_lines[found] == [2]


def test_rows_that_are_lists_without_end(tokenizer: Path, tmp_path: Path) -> None:
    good = json.dumps({"text": "one plus two"})
    (tmp_path / "in.jsonl").write_text(f"{good}\n{DEEP}\n")
    card = prepare(
        tmp_path / "in.jsonl", tokenizer, tmp_path / "out", max_refused=0.5, progress=False
    )
    assert card.refused == {"bad JSON": 1}
    (tmp_path / "in.json").write_text(f"[{good}, {DEEP}]")  # where the next row begins is not told
    with pytest.raises(UserError, match="in.json cannot be read .*recursion.*: copy it again"):
        prepare(tmp_path / "in.json", tokenizer, tmp_path / "other", progress=False)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("arguments", ["[" * 100_000, '{"a": NaN}', '{"a":' * 500])
def test_arguments_that_are_no_json_are_text(arguments: str) -> None:
    call = {"function": {"name": "add", "arguments": arguments}}
    assert _call(call) == call
