"""The command line: what it prints, how it ends, and what a killed run leaves behind."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import psutil
import pytest

from megatron_tsft.data.prepare import prepare
from megatron_tsft.data.prepared import DataCard, PreparedData
from megatron_tsft.errors import UserError
from tests.data.chat_tokenizers import assistant, byte_level, user

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "prepare_data.py"
ROWS = [
    {"messages": [user("one plus two?"), assistant("three")]},
    {"prompt": "The answer", "completion": " is five.", "weight": 2},
]


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("prepare_data", TOOL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    byte_level().save_pretrained(str(tmp_path / "tokenizer"))
    lines = [
        json.dumps(ROWS[0]),
        *["{"] * 6,
        json.dumps(ROWS[1]),
        json.dumps(ROWS[0]),
        json.dumps({"messages": []}),
    ]
    (tmp_path / "in.jsonl").write_text("\n".join(lines) + "\n")
    places = {"--input": "in.jsonl", "--tokenizer": "tokenizer", "--output": "out"}
    words = [word for flag, name in places.items() for word in (flag, str(tmp_path / name))]
    return [*words, "--max-refused", "0.95"]


def start(*words: object) -> subprocess.Popen[str]:
    """tools/prepare_data.py as a user starts it."""
    line = [sys.executable, str(TOOL), *map(str, words)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def test_the_report(
    tool: ModuleType, arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tool.main([*arguments, "--show", "2"]) == 0
    out, err = capsys.readouterr()
    card = DataCard.load(tmp_path / "out")
    assert (
        f"wrote {tmp_path / 'out'}: 3 conversations, {card.tokens} tokens,"
        f" {card.supervised_tokens} supervised (" in out
    )
    assert f"longest {card.longest}\n" in out
    assert "truncated: 0, duplicates (kept): 1, with token weights\n" in out
    assert (
        "refused: 7\n  6: bad JSON (lines 2, 3, 4, 5, 6, ...)\n  1: no assistant turn (lines 10)\n"
        in out
    )
    assert (
        "<|im_start|>assistant\n[[three<|im_end|>]]\n" in out
        and "The answer[[ is five.<|im_end|>]]\n" in out
    )
    assert "tokenising: 100%" in err
    assert card.refused == {"bad JSON": 6, "no assistant turn": 1}
    assert card.refused_lines == {"bad JSON": [2, 3, 4, 5, 6], "no assistant turn": [10]}


def test_too_many_refused_rows_are_an_error(
    tool: ModuleType, arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tool.main([*arguments[:-2], "--no-progress"]) == 2
    out, err = capsys.readouterr()
    assert not out and "7 rows (70.0%) cannot be used, more than --max-refused 0.1 allows" in err
    assert "bad JSON (6, the first in line 2); no assistant turn (1, the first in line 10)" in err
    assert not (tmp_path / "out").exists()


def test_how_rows_are_encoded(
    tool: ModuleType, arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The flags reach the template, in this process and in workers, and the card."""
    template = tmp_path / "own.jinja"
    template.write_text(
        "{{ strftime_now('%d %b %Y') }}{% for m in messages %}"
        "{{ '<|' + m.role + '|>' + m.content + tone + '<|end|>' }}{% endfor %}"
    )
    flags = ["--chat-template", str(template), "--chat-template-kwargs", '{"tone": "!"}']
    flags += ["--date", "2026-11-30", "--no-progress", "--show", "1", "--overwrite"]
    cards = []
    for workers in ("1", "2"):
        assert tool.main([*arguments, *flags, "--workers", workers]) == 0
        out, _ = capsys.readouterr()
        assert "30 Nov 2026<|user|>one plus two?!<|end|><|assistant|>[[three!<|end|>]]" in out
        cards.append(DataCard.load(tmp_path / "out"))
    assert cards[0] == cards[1] and cards[0].date == "2026-11-30"
    assert cards[0].made_with == {"variables": {"tone": "!"}, "format": "messages"}
    assert cards[0].chat_template == template.read_text()
    for bad, text in (
        (["--chat-template", "nowhere"], "--chat-template nowhere cannot be read"),
        (["--chat-template-kwargs", "{"], "is no JSON"),
        (["--chat-template-kwargs", "[]"], "is not a JSON object"),
        (["--date", "tomorrow"], "--date tomorrow: give a day as YYYY-MM-DD"),
        (["--max-refused", "3"], "must be a share from 0 to 1"),
    ):
        assert tool.main([*arguments, *bad]) == 2
        assert text in capsys.readouterr().err.splitlines()[-1]


def test_a_folder_that_is_there_is_shown(
    tool: ModuleType, arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tool.main([*arguments, "--no-progress"]) == 0
    looking = ["--prepared", str(tmp_path / "out"), *arguments[2:4]]
    name = PreparedData.load(tmp_path / "out").row(1).sample_id
    capsys.readouterr()
    assert tool.main(arguments[:4]) == 2
    assert "name the rows (--input) and the folder" in capsys.readouterr().err
    assert tool.main([*looking, "--show", name[:9]]) == 0
    out, _ = capsys.readouterr()
    assert f"--- conversation 1, {len(PreparedData.load(tmp_path / 'out').row(1).input_ids)}" in out
    assert "The answer[[ is five.<|im_end|>]]" in out and "]]x2" in out.splitlines()[-1]
    for bad, text in (
        (["--show", "zz"], "--show zz: give a number, or a conversation's sample_id"),
        (["--show", "f" * 32], "has no conversation of that sample_id"),
        ([], "--prepared is for --show and --report of a folder that is there"),
        (["--report", str(tmp_path / "no" / "a.html")], "its folder does not exist"),
    ):
        assert tool.main([*looking, *bad]) == 2
        assert text in capsys.readouterr().err.splitlines()[-1]


def test_a_share_is_held_out(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An exact share, whole groups, and the same conversations whatever the order and the
    workers."""
    byte_level().save_pretrained(str(tmp_path / "tokenizer"))
    rows = [{"messages": [user(f"{i} plus one?"), assistant(f"{i + 1}")]} for i in range(60)]
    rows += [rows[i] | {"id": i} for i in range(0, 60, 2)] + [{"messages": []}]

    def run(name: str, order: list[int], *more: str) -> tuple[set[str], set[str]]:
        lines = [json.dumps(rows[i]) + "\n" for i in order]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
        words = ["--input", tmp_path / f"{name}.jsonl", "--tokenizer", tmp_path / "tokenizer"]
        words += ["--output", tmp_path / name, "--no-progress", "--heldout", "0.1", *more]
        assert tool.main([str(word) for word in words]) == 0
        sides = [PreparedData.load(tmp_path / end) for end in (name, f"{name}-heldout")]
        assert sum(map(len, sides)) == 90 and len(sides[1]) in (9, 10)
        assert sides[0].card.refused == {"no assistant turn": 1} and not sides[1].card.refused
        assert sides[0].card.made_with["heldout"] == 0.1
        train, held = (set(side.sample_ids.to_pylist()) for side in sides)
        return train, held

    there = list(range(len(rows)))
    train, held = run("there", there)
    assert not train & held and len(train | held) == 60
    assert run("back", there[::-1]) == run("two", there, "--workers", "2") == (train, held)
    assert "conversations held out" in capsys.readouterr().out
    (tmp_path / "one.jsonl").write_text(json.dumps(rows[0]) + "\n" + json.dumps(rows[0]) + "\n")
    words = ["--input", tmp_path / "one.jsonl", "--tokenizer", tmp_path / "tokenizer"]
    words += ["--output", tmp_path / "one", "--no-progress", "--heldout"]
    assert tool.main([*map(str, words), "0.5"]) == 2
    assert "2 conversations, all alike" in capsys.readouterr().err
    assert tool.main([*map(str, words), "1"]) == 2
    assert "--heldout 1.0: must be a share" in capsys.readouterr().err
    assert not (tmp_path / "one").exists() and not (tmp_path / "one-heldout").exists()


def test_errors_are_one_line(
    tool: ModuleType, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert tool.main([*arguments, "--no-progress", "--strict"]) == 2
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1
    assert err.startswith("error: ") and "in.jsonl, line 2: bad JSON (" in err
    assert (
        tool.main([*arguments, "--no-progress", "--max-tokens", "12", "--too-long", "refuse"]) == 0
    )
    out, err = capsys.readouterr()
    assert not err and "longer than --max-tokens 12 (lines 1, 9)" in out
    assert tool.main([*arguments, "--no-progress"]) == 2
    assert (
        "exists already: name another folder, delete it, or pass --overwrite"
        in capsys.readouterr().err
    )
    assert tool.main([*arguments, "--no-progress", "--overwrite"]) == 0


def test_help_shows_an_example(tool: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        tool.main(["--help"])
    assert (
        done.value.code == 0
        and "examples:\n  tools/prepare_data.py --input" in capsys.readouterr().out
    )


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_killed_run_leaves_no_folder_that_loads(
    arguments: list[str], tmp_path: Path, workers: int
) -> None:
    """Killed while it tokenises: nothing loads, no worker stays behind, and the next run
    succeeds."""
    rows = [
        json.dumps({"messages": [user(f"{i} plus one?"), assistant(f"{i + 1} " * 20)]})
        for i in range(20000)
    ]
    (tmp_path / "in.jsonl").write_text("\n".join(rows))
    process = start(*arguments, "--workers", workers)
    partial = tmp_path / "none yet"
    family: list[psutil.Process] = []
    try:
        while process.poll() is None:
            partial = next(tmp_path.glob(".out.*.partial"), partial)
            stream = partial / "part-00000.arrow"
            if stream.is_file() and stream.stat().st_size > 2000:  # some batches are written
                break
            time.sleep(0.02)
        family = psutil.Process(process.pid).children(recursive=True)
        assert process.poll() is None, process.communicate()
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    assert workers == 1 or len(family) >= 3  # the server and its workers
    _, alive = psutil.wait_procs(family, timeout=20)
    assert not alive, alive
    assert not (tmp_path / "out").exists() and partial.is_dir()
    for folder in (tmp_path / "out", partial):
        with pytest.raises(UserError, match="has no tsft_data.json"):
            PreparedData.load(folder)
    (tmp_path / "in.jsonl").write_text("\n".join(rows[:10]))
    card = prepare(tmp_path / "in.jsonl", tmp_path / "tokenizer", tmp_path / "out", progress=False)
    assert (
        card.conversations == len(PreparedData.load(tmp_path / "out")) == 10
        and not partial.exists()
    )


def test_from_the_shell(arguments: list[str], tmp_path: Path) -> None:
    process = start(*arguments, "--no-progress")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and not err, err
    assert "wrote" in out and len(PreparedData.load(tmp_path / "out")) == 3
