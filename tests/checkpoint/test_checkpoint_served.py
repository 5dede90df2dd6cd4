"""How a trained model stops and writes reaches its export."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_tsft.checkpoint.served import SERVED_FILE, Served
from megatron_tsft.errors import UserError


def card(ends: dict[str, list[int]], template: str | None = None, rows: int = 1000) -> Any:
    return SimpleNamespace(conversations=rows, turn_ends=ends, chat_template=template)


def folder(path: Path, **files: dict[str, Any]) -> Path:
    path.mkdir()
    for name, values in files.items():
        (path / f"{name}.json").write_text(json.dumps(values))
    return path


def test_what_the_data_teaches() -> None:
    one = card({"<|im_end|>": [7, 990], "<|tool|>": [8, 10], "odd": [9, 9]}, "{{ a }}")
    assert Served.by([one]) == Served({"<|im_end|>": 7, "<|tool|>": 8}, "{{ a }}")
    text = card({"</s>": [2, 1000]})  # raw text has no template
    assert Served.by([one, text]) == Served({"<|im_end|>": 7, "<|tool|>": 8, "</s>": 2}, "{{ a }}")
    other = card({"<|im_end|>": [7, 1000]}, "{{ b }}")
    assert Served.by([one, other]).chat_template is None


def test_an_export_stops_where_the_data_does(tmp_path: Path) -> None:
    served = Served({"<|im_end|>": 7}, "{{ messages }}")
    served.save(tmp_path)
    assert Served.load(tmp_path) == served and Served.load(tmp_path / "nowhere") is None
    hf = folder(tmp_path / "base", generation_config={"eos_token_id": 2, "_from_model_config": 1})
    assert served.unknown_stops(hf) == {"<|im_end|>": 7}
    served.write_into(hf)
    assert json.loads((hf / "generation_config.json").read_text()) == {"eos_token_id": [7, 2]}
    assert (hf / "chat_template.jinja").read_text() == "{{ messages }}"
    assert not served.unknown_stops(hf)
    # without a generation_config the model's own configuration says where it stops
    hf = folder(tmp_path / "config", config={"eos_token_id": [2, 3]})
    served.write_into(hf)
    assert json.loads((hf / "generation_config.json").read_text())["eos_token_id"] == [7, 2, 3]
    # what is known is left alone, byte by byte
    same = {"eos_token_id": [2, 7]}, {"chat_template": "{{ messages }}\n"}
    hf = folder(tmp_path / "chat", generation_config=same[0], tokenizer_config=same[1])
    before = {path.name: path.read_bytes() for path in hf.iterdir()}
    served.write_into(hf)
    assert {path.name: path.read_bytes() for path in hf.iterdir()} == before


def test_a_file_of_another_version_is_refused(tmp_path: Path) -> None:
    (tmp_path / SERVED_FILE).write_text('{"format_version": 0}')
    with pytest.raises(UserError, match="format version 0, not 1"):
        Served.load(tmp_path)
