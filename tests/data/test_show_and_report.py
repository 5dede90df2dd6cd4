"""What is shown of a conversation is what is in it: every token's text, border and weight."""

import html
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_tsft.data.chat import ChatEncoder
from megatron_tsft.data.prepare import prepare
from megatron_tsft.data.prepared import PreparedData, Sample
from megatron_tsft.data.report import write_report
from megatron_tsft.data.show import shown
from megatron_tsft.data.token_text import Stretch, TokenTexts, stretches
from tests.data.chat_tokenizers import assistant, byte_level, sentencepiece_like, user


def encoded(tokenizer: Any, row: dict[str, Any]) -> Sample:
    found = ChatEncoder(tokenizer).encode(row)
    return Sample("id", found.input_ids, found.loss_mask, found.token_weights)


def test_stretches_cover_a_conversation() -> None:
    mask = np.array([0, 0, 1, 1, 1, 0, 1], bool)
    sample = Sample("", np.arange(7), mask, np.array([0, 0, 1, 0.5, 0.5, 0, -1], np.float32))
    assert stretches(sample) == [
        Stretch(0, 2, None),
        Stretch(2, 3, 1),
        Stretch(3, 5, 0.5),
        Stretch(5, 6, None),
        Stretch(6, 7, -1),
    ]
    assert stretches(Sample("", np.arange(7), mask, None))[1] == Stretch(2, 5, 1)


def test_a_gained_space_is_seen() -> None:
    """A sentencepiece decoder would cut it off."""
    tokenizer = sentencepiece_like()
    row = {"prompt": "two\n", "completion": "five"}
    text = shown(tokenizer, encoded(tokenizer, row), "row")
    assert "↵│[[five" in text or "↵│[[f" in text
    spaced = shown(tokenizer, encoded(tokenizer, row | {"completion": " five"}), "row")
    assert "[[␣five" in spaced and "[[ five" in spaced


@pytest.mark.parametrize("make", [byte_level, sentencepiece_like])
def test_the_tokens_are_the_text(make: Any) -> None:
    tokenizer = make()
    text = " two  plus\n\n five two"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = TokenTexts(tokenizer).each(ids)
    assert "".join(pieces).removeprefix(" ") == text.removeprefix(" ") and len(pieces) == len(ids)
    parts = TokenTexts(byte_level()).each(
        byte_level()("é€😀", add_special_tokens=False)["input_ids"]
    )
    assert all(part and "\ufffd" not in part for part in parts)  # parts of a character have names


def test_weights_and_long_stretches() -> None:
    tokenizer = byte_level()
    answer = "five " * 100
    row = {"messages": [user("two?"), assistant(answer, critical=[[0, 4]])]}
    sample = encoded(tokenizer, row)
    text = shown(tokenizer, sample, "row")
    assert "]]x0" in text and " tokens ... " in text
    everything = shown(tokenizer, sample, "row", everything=True)
    line = everything.splitlines()[-1]
    pieces = re.split("│", re.sub(r"\[\[|\]\](x[-0-9.e]+)?", "", line.removeprefix("tokens: ")))
    want = tokenizer.decode(sample.input_ids.tolist())
    assert "".join(pieces).replace("␣", " ").replace("↵", "\n") == want
    assert len(pieces) == len(sample.input_ids)


def test_the_page(tmp_path: Path) -> None:
    """All text of the sampled conversations is there, escaped; nothing is fetched or run."""
    tokenizer = byte_level()
    tokenizer.save_pretrained(str(tmp_path / "tokenizer"))
    attack = '<script src="https://example.org/x.js">alert("&")</script>'
    rows = [
        {"prompt": f"two {attack}", "completion": f" five {i}", "weight": i - 1} for i in range(3)
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "in.jsonl").write_text(lines + "{\n" * 2)
    prepare(
        tmp_path / "in.jsonl",
        tmp_path / "tokenizer",
        tmp_path / "out",
        max_refused=1,
        progress=False,
    )
    data = PreparedData.load(tmp_path / "out")
    write_report(tmp_path / "page.html", data, tokenizer)
    page = (tmp_path / "page.html").read_text()
    assert "<script" not in page and "http" not in re.sub(r"&lt;.*?&gt;", "", _text(page, raw=True))
    blocks = re.findall(r'<pre class="tokens">(.*?)</pre>', page, re.S)
    assert len(blocks) == 3
    for i, block in enumerate(blocks):
        ids = data.row(i).input_ids
        assert block.count("<i>") == len(ids)
        assert _text(re.sub(r"<small>.*?</small>", "", block)) == tokenizer.decode(ids.tolist())
    assert 'class="negative"' in blocks[0] and 'class="none"' in blocks[1]
    assert "refused: bad JSON" in page and page.count("<svg") == 2


def _text(page: str, *, raw: bool = False) -> str:
    """What of a page is text."""
    text = re.sub("<[^>]*>", "", page)
    return text if raw else html.unescape(text)
