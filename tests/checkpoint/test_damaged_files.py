"""Damage that dev/fuzz.py found and that ended in a traceback, a killed process or silence: by
kind, each one line now."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_tsft.checkpoint.convert import export_hf, import_hf
from megatron_tsft.checkpoint.folder import TRACKER, latest_checkpoint, tracked
from megatron_tsft.checkpoint.hf_folder import HfWeights
from megatron_tsft.checkpoint.saved_arguments import saved_arguments
from megatron_tsft.checkpoint.served import SERVED_FILE, Served
from megatron_tsft.checkpoint.tokenizer import load_tokenizer
from megatron_tsft.errors import DamagedError, UserError
from megatron_tsft.inside import inside
from tests.checkpoint.conftest import save_tokenizer

Make = Callable[..., Path]


@pytest.fixture
def imported(make_hf: Make, tmp_path: Path) -> Path:
    import_hf(make_hf(tokenizer=True), tmp_path / "megatron", progress=False)
    return tmp_path / "megatron"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"one": 2**31}, "the token 'one' has the id 2147483648, more than any vocabulary"),
        ({"one": 4}, "the tokens 'one' and 'two' have one id, 4"),
    ],
)
def test_ids_of_a_tokenizer(change: dict[str, int], words: str, tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    path = tmp_path / "tokenizer.json"
    values = json.loads(path.read_text())
    values["model"]["vocab"] |= change
    path.write_text(json.dumps(values))
    with pytest.raises(UserError, match=f"tokenizer.json is damaged .{words}.: download or copy"):
        load_tokenizer(tmp_path)


def test_a_longest_text_that_is_no_number(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": "x"}))
    with pytest.raises(UserError, match="model_max_length='x': it must be a number"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["a\0b", "é" * 300, "\ud800"])
def test_names_that_no_file_can_have(name: str, make_hf: Make) -> None:
    source = make_hf(shard="60KB")
    path = source / "model.safetensors.index.json"
    values = json.loads(path.read_text())
    values["weight_map"]["model.norm.weight"] = name
    path.write_text(json.dumps(values))
    with pytest.raises(UserError, match="as no file can be called|is damaged") as refused:
        HfWeights(source)
    assert len(str(refused.value)) < 1000


@pytest.mark.parametrize("weight_map", [None, [], {"model.norm.weight": 5}, "x"])
def test_an_index_of_another_type(weight_map: object, make_hf: Make) -> None:
    source = make_hf(shard="60KB")
    path = source / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(
        UserError, match="index.json is damaged .weight_map.*: it must be .*copy it"
    ):
        HfWeights(source)


def test_a_link_that_names_itself(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    assert not inside(tmp_path, "loop").is_file()


@pytest.mark.parametrize(
    "content", [b"\xff\xfe5", b"9" * 5000, b"5\x00", "٥".encode(), b"-5", b"5.0", b"", b"re lease"]
)
def test_a_tracker_that_says_nothing(content: bytes, imported: Path) -> None:
    (imported / TRACKER).write_bytes(content)
    assert tracked(imported) is None
    with pytest.raises(UserError, match=f"{TRACKER} says .*it must say 'release' or an iteration"):
        latest_checkpoint(imported)


def test_a_tracker_without_end(imported: Path) -> None:
    (imported / TRACKER).unlink()
    (imported / TRACKER).symlink_to("/dev/zero")
    with pytest.raises(UserError, match=f"has no {TRACKER}"):
        latest_checkpoint(imported)


@pytest.mark.parametrize("key", ["offset", "length", "relative_path"])
def test_a_description_of_other_types(key: str, imported: Path) -> None:
    """A flipped bit of a pickle gives other names and types, and no error of its own."""
    path = imported / "release" / ".metadata"
    path.write_bytes(path.read_bytes().replace(key.encode(), key.upper().encode()))
    with pytest.raises(DamagedError, match=r"\.metadata cannot be read .*use another iteration"):
        latest_checkpoint(imported)


@pytest.mark.parametrize("noise", [b"\0", b"\xff", b"PK\x05\x06"])
def test_data_that_is_not_compared_with_its_checksum(
    noise: bytes, imported: Path, tmp_path: Path
) -> None:
    path = imported / "release" / "__0_0.distcp"
    content = bytearray(path.read_bytes())
    content[100:2000] = (noise * 1900)[:1900]
    path.write_bytes(content)
    with pytest.raises(DamagedError, match="is damaged .*: use another checkpoint"):
        export_hf(imported, tmp_path / "out", progress=False, verify_files="none")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", [b"", b"x" * 100, b"\x80\x02}q\x00.", b"PK\x03\x04"])
def test_arguments_that_cannot_be_read(content: bytes, imported: Path) -> None:
    (imported / "release" / "common.pt").write_bytes(content)
    with pytest.raises(UserError, match="does not say what arguments it was saved with"):
        saved_arguments(imported / "release")


@pytest.mark.parametrize(
    "content", [b"[1]", b"\xff", b'{"format_version": 1}', b'{"files": {"a": {"size": "5"}}}']
)
def test_a_list_of_another_type(content: bytes, imported: Path, tmp_path: Path) -> None:
    (imported / "release" / "tsft_files.00000.json").write_bytes(content)
    with pytest.raises(
        DamagedError, match=r"tsft_files.00000.json is damaged \(.*import the model"
    ):
        export_hf(imported, tmp_path / "out", progress=False)


def test_what_a_run_taught_is_listed_and_missed(imported: Path, tmp_path: Path) -> None:
    """An export that found no such file would never stop, and say nothing."""
    served = Served({"</s>": 2}, None)
    served.save(imported)
    served.save(imported)
    export_hf(imported, tmp_path / "whole", progress=False)
    shutil.copytree(imported, tmp_path / "copy")
    (tmp_path / "copy" / SERVED_FILE).unlink()
    with pytest.raises(DamagedError, match=f"{SERVED_FILE} is missing"):
        export_hf(tmp_path / "copy", tmp_path / "other", progress=False)
    (tmp_path / "copy" / SERVED_FILE).mkdir()
    with pytest.raises(UserError, match=f"{SERVED_FILE} is no file: "):
        Served.load(tmp_path / "copy")


@pytest.mark.parametrize("stops", ["x", 1.5, [None], {"a": 1}, -1])
def test_stops_of_another_type(stops: object, imported: Path, tmp_path: Path) -> None:
    path = imported / "hf" / "generation_config.json"
    values = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(values | {"eos_token_id": stops}))
    Served({"</s>": 2}, None).save(imported)  # lists the folder as it is now
    with pytest.raises(UserError, match="generation_config.json is damaged .eos_token_id="):
        export_hf(imported, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()
