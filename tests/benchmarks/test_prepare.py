"""benchmarks/prepare.py runs and says what it measured; what it measured is not judged here."""

import re
from pathlib import Path

import pytest

from benchmarks import prepare
from tests.data.chat_tokenizers import byte_level


@pytest.mark.slow
def test_it_measures_time_and_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    byte_level().save_pretrained(str(tmp_path / "tokenizer"))
    words = ["--tokenizer", str(tmp_path / "tokenizer"), "--chats", "70", "--repeat", "1"]
    assert prepare.main([*words, "--memory", "50", "100"]) == 0
    out = capsys.readouterr().out
    assert re.search(
        r"70 chats, [\d.]+ MB, \d+ tokens: preparing takes [\d.]+ x rendering and batch-tokenising"
        r" alone \([\d.]+\)",
        out,
    )
    assert re.search(r"peak memory at 50 and 100 short rows: \d+ and \d+ MB, -?\d+ bytes a r", out)


def test_the_chats_are_the_same_each_time() -> None:
    one, other = list(prepare.chats(5, 20, 3)), list(prepare.chats(5, 20, 3))
    assert one == other and len({str(row) for row in one}) == 5
