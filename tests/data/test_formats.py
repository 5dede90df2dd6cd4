"""Files and row formats that data sets come in: all of them give the folder that JSONL of messages
gives."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from megatron_tsft.data.encoding import Encoding
from megatron_tsft.data.formats import FORMATS, detect, parse_columns
from megatron_tsft.data.prepare import prepare
from megatron_tsft.data.prepared import DataCard, PreparedData
from megatron_tsft.errors import UserError
from tests.data.chat_tokenizers import NO_SYSTEM, assistant, byte_level, user

Rows = list[dict[str, Any]]
ROWS: Rows = [
    {"messages": [user("one plus two?"), assistant("three")]},
    {"messages": [user("two plus two?"), assistant("four"), user("and?"), assistant("five")]},
    {"messages": [{"role": "system", "content": "be fine"}, user("hello"), assistant("hello")]},
]


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., DataCard]:
    """run(paths, name, **encoding): a preparation."""
    byte_level(NO_SYSTEM).save_pretrained(str(tmp_path / "tokenizer"))

    def call(paths: Any, name: str = "out", **encoding: Any) -> DataCard:
        made = Encoding(date="2026-11-30", **encoding)
        folder = tmp_path / name
        return prepare(paths, tmp_path / "tokenizer", folder, encoding=made, progress=False)

    return call


def lines(path: Path, rows: Rows) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_files_of_every_kind(run: Callable[..., DataCard], tmp_path: Path) -> None:
    want = run(lines(tmp_path / "rows.jsonl", ROWS), "want").fingerprint
    text = (tmp_path / "rows.jsonl").read_bytes()
    table = pa.Table.from_pylist(ROWS)
    files = {name: tmp_path / name for name in ("a.jsonl.gz", "a.jsonl.zst", "a.json", "b.json")}
    files["a.jsonl.gz"].write_bytes(gzip.compress(text))
    with pa.CompressedOutputStream(str(files["a.jsonl.zst"]), "zstd") as out:
        out.write(text)
    files["a.json"].write_text(json.dumps(ROWS, indent=1))
    files["b.json"].write_bytes(text)  # lines, whatever the name says
    files["a.json.gz"] = tmp_path / "a.json.gz"
    files["a.json.gz"].write_bytes(gzip.compress(json.dumps(ROWS).encode()))
    files["a.parquet"] = tmp_path / "a.parquet"
    parquet.write_table(table, files["a.parquet"], row_group_size=2)
    for name, new in (("a.arrow", pa.ipc.new_file), ("b.arrow", pa.ipc.new_stream)):
        files[name] = tmp_path / name
        with pa.OSFile(str(files[name]), "wb") as sink, new(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    for name, path in files.items():
        assert run(path, f"from-{name}").fingerprint == want, name
    # several, and a folder of them, by name
    one = lines(tmp_path / "parts" / "a.jsonl", ROWS[:1])
    rest = tmp_path / "parts" / "b.parquet"
    parquet.write_table(pa.Table.from_pylist(ROWS[1:]), rest)
    (tmp_path / "parts" / "README.md").write_text("about it")
    assert run([one, rest], "several").fingerprint == want
    assert run(tmp_path / "parts", "folder").fingerprint == want


def test_a_damaged_file_is_named(run: Callable[..., DataCard], tmp_path: Path) -> None:
    for name, content in (
        ("a.parquet", b"PAR1 and no more"),
        ("a.arrow", b"ARROW1 and no more"),
        ("a.jsonl.zst", b"nothing packed"),
        ("a.json", b"[1, 2"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=rf"{name} cannot be (read|unpacked)"):
            run(tmp_path / name)
        assert not (tmp_path / "out").exists()
    (tmp_path / "a.csv").write_text("prompt,completion\n")
    with pytest.raises(UserError, match="ends in none of .jsonl"):
        run(tmp_path / "a.csv")


def test_lines_of_several_files_are_named(run: Callable[..., DataCard], tmp_path: Path) -> None:
    one = lines(tmp_path / "a.jsonl", ROWS * 7)
    two = lines(tmp_path / "b.jsonl", [*ROWS, {"messages": []}])
    card = run([one, two])
    assert card.refused_lines == {"no assistant turn": ["b.jsonl:4"]}
    assert DataCard.load(tmp_path / "out") == card


SAME: dict[str, tuple[str, Rows]] = {
    "alpaca": (
        "alpaca",
        [
            {"instruction": "one plus two?", "input": "", "output": "three"},
            {
                "instruction": "and?",
                "output": "five",
                "history": [["two plus two?", "four"]],
            },
            {"instruction": "hello", "output": "hello", "system": "be fine"},
        ],
    ),
    "sharegpt": (
        "sharegpt",
        [
            {
                "conversations": [
                    {"from": "human", "value": "one plus two?"},
                    {"from": "gpt", "value": "three"},
                ]
            },
            {
                "conversations": [
                    {"from": "user", "value": "two plus two?"},
                    {"from": "assistant", "value": "four", "loss": False},
                    {"from": "human", "value": "and?"},
                    {"from": "model", "value": "five"},
                ]
            },
            {
                "system": "be fine",
                "conversations": [user("hello"), assistant("hello")],
            },
        ],
    ),
    "pairs": (
        "preference",
        [
            {"prompt": "one plus two?", "chosen": [assistant("three")], "rejected": []},
            {
                "prompt": ROWS[1]["messages"][:3],
                "chosen": ROWS[1]["messages"][3:],
                "rejected": [assistant("six")],
            },
            {"chosen": ROWS[2]["messages"], "rejected": ROWS[2]["messages"][:1]},
        ],
    ),
}


@pytest.mark.parametrize("name", SAME)
def test_formats_of_rows(run: Callable[..., DataCard], tmp_path: Path, name: str) -> None:
    """The second conversation's first answer is context."""
    kind, rows = SAME[name]
    context = [*ROWS]
    context[1] = {"messages": [*ROWS[1]["messages"]]}
    context[1]["messages"][1] = assistant("four", loss=False)
    want = run(lines(tmp_path / "want.jsonl", context), "want")
    path = lines(tmp_path / "rows.jsonl", rows)
    if kind == "preference":
        with pytest.raises(UserError, match="--format preference learns the chosen side"):
            run(path)
        found = run(path, format=kind)
    else:
        found = run(path)
    assert found.made_with["format"] == kind and found.fingerprint == want.fingerprint
    assert len(PreparedData.load(tmp_path / "out")) == 3


def test_calls_of_sharegpt() -> None:
    row = {
        "conversations": [
            {"from": "human", "value": "two?"},
            {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
            {"from": "observation", "value": "nine"},
            {"from": "gpt", "value": "nine"},
        ],
        "tools": "[]",
    }
    made = FORMATS["sharegpt"].make(row)
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    assert [message["role"] for message in made["messages"]] == [
        *("user", "assistant", "tool", "assistant")
    ]
    assert made["messages"][1]["tool_calls"] == [call] and made["tools"] == "[]"


def test_columns_have_other_names(run: Callable[..., DataCard], tmp_path: Path) -> None:
    want = run(lines(tmp_path / "want.jsonl", ROWS), "want")
    path = lines(tmp_path / "rows.jsonl", [{"dialog": row["messages"], "n": 1} for row in ROWS])
    with pytest.raises(UserError, match="has rows of dialog, n, which is none of the formats"):
        run(path)
    found = run(path, columns=parse_columns(["messages=dialog"]))
    assert found.fingerprint == want.fingerprint
    with pytest.raises(UserError, match="--columns dialog: write ours=theirs"):
        parse_columns(["dialog"])


def test_what_a_format_is_told_from() -> None:
    assert detect([{"text": "a"}, {"prompt": "a", "completion": "b"}, {"text": "a"}], {}, "") == (
        "text"
    )
    assert detect([{"messages": [], "prompt": "a", "completion": "b"}], {}, "") == "messages"
    with pytest.raises(UserError, match=r"--columns messages=\.\.\."):
        detect([{"mesages": []}], {}, "x")
