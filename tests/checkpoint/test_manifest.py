"""A damaged file is named before anything is made of it."""

import json
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_tsft.checkpoint.card import CARD_FILE, copy_card
from megatron_tsft.checkpoint.convert import export_hf, import_hf
from megatron_tsft.checkpoint.folder import latest_checkpoint
from megatron_tsft.checkpoint.manifest import (
    LIST,
    check_files,
    check_folder,
    checksum,
    data_files,
    read_lists,
    write_list,
)
from megatron_tsft.checkpoint.verify import verify
from megatron_tsft.errors import UserError

Make = Callable[..., Path]


@pytest.fixture
def imported(make_hf: Make, tmp_path: Path) -> Path:
    import_hf(make_hf(tokenizer=True), tmp_path / "megatron", progress=False)
    return tmp_path / "megatron"


def flip(path: Path, place: int, bit: int) -> None:
    """Change one bit of a file, and nothing else of it."""
    facts = path.stat()
    with path.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1 << bit]))
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))


def test_every_flipped_bit_is_noticed(imported: Path, tmp_path: Path) -> None:
    """In the weights, their description, the card and the Hugging Face files: 89 of 89, as many as
    were tried from outside."""
    g = random.Random(0)
    files = [p for p in sorted(imported.rglob("*")) if p.is_file() and p.suffix != ".txt"]
    files = [path for path in files if not path.name.startswith("tsft_files")]
    assert {p.name for p in files} >= {CARD_FILE, ".metadata", "__0_0.distcp", "config.json"}
    for number in range(89):
        path = files[number % len(files)]
        place, bit = g.randrange(path.stat().st_size), g.randrange(8)
        flip(path, place, bit)
        with pytest.raises(UserError):
            export_hf(imported, tmp_path / "out", progress=False)
        assert not (tmp_path / "out").exists()
        flip(path, place, bit)
    export_hf(imported, tmp_path / "out", progress=False)


@pytest.mark.parametrize("how", ["full", "sizes", "none"])
def test_what_each_way_notices(imported: Path, tmp_path: Path, how: str) -> None:
    (weights,) = (imported / "release").glob("*.distcp")
    flip(weights, weights.stat().st_size // 2, 3)
    checkpoint = latest_checkpoint(imported)
    if how == "full":
        with pytest.raises(UserError, match=r"distcp is damaged \(its checksum differs\): copy"):
            check_folder(imported, checkpoint, how)
        with pytest.raises(UserError, match="damaged"):
            verify(tmp_path / "hf", imported, weights_only=True, progress=False)
    else:
        assert check_folder(imported, checkpoint, how) == []
    with weights.open("ab") as file:
        file.write(b"more")
    if how == "none":
        assert check_folder(imported, checkpoint, how) == []
    else:
        with pytest.raises(UserError, match=r"distcp has \d+ bytes instead of \d+"):
            check_folder(imported, checkpoint, how)
    (imported / "hf" / "config.json").unlink()
    if how != "none":
        with pytest.raises(UserError, match=r"config\.json is missing"):
            check_folder(imported, checkpoint, how)


def test_ranks_share_the_reading(tmp_path: Path) -> None:
    """Every byte is read once, and whoever reads the damaged file says so."""
    folder = tmp_path / "iter_0000007"
    folder.mkdir()
    g = random.Random(1)
    for number in range(9):
        (folder / f"__{number}_0.distcp").write_bytes(g.randbytes(1000 * (number + 1)))
    for rank in range(3):  # each lists its own
        write_list(folder, [f"__{i}_0.distcp" for i in range(rank, 9, 3)], rank)
    total = sum((folder / name).stat().st_size for name in data_files(folder))
    read: list[int] = []
    for rank in range(4):
        assert check_files(folder, share=(rank, 4), progress=read.append) == []
    assert sum(read) == total and len(read_lists(folder)) == 9
    flip(folder / "__5_0.distcp", 77, 0)
    failed = 0
    for rank in range(4):
        try:
            check_files(folder, share=(rank, 4))
        except UserError as error:
            assert "__5_0.distcp is damaged" in str(error) and "--ckpt-step" in str(error)
            failed += 1
    assert failed >= 1
    (folder / "__9_0.distcp").write_bytes(b"new")
    flip(folder / "__5_0.distcp", 77, 0)
    assert check_files(folder) == ["__9_0.distcp"]


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"format_version": 2, "algorithm": "xxh3_128", "files": {}}', "null"]
)
def test_a_damaged_list_is_named(imported: Path, text: str) -> None:
    (imported / "release" / LIST.format(0)).write_text(text)
    with pytest.raises(UserError, match=r"tsft_files\.00000\.json is damaged"):
        check_folder(imported, latest_checkpoint(imported))


def test_a_list_does_not_lead_out_of_its_folder(imported: Path) -> None:
    path = imported / "release" / LIST.format(0)
    values = json.loads(path.read_text())
    values["files"]["../../hf/config.json"] = {"size": 1, "checksum": "0" * 32}
    path.write_text(json.dumps(values))
    with pytest.raises(UserError, match="lies outside of it"):
        check_folder(imported, latest_checkpoint(imported))


def test_a_folder_without_lists_is_taken(imported: Path, tmp_path: Path) -> None:
    """Imported before there were any: by sizes, as before."""
    for path in imported.rglob("tsft_files*"):
        path.unlink()
    export_hf(imported, tmp_path / "out", progress=False)
    unlisted = check_folder(imported, latest_checkpoint(imported))
    assert "__0_0.distcp" in unlisted and ".metadata" in unlisted


def test_a_runs_folder_lists_what_it_was_given(imported: Path, tmp_path: Path) -> None:
    copy_card(imported, tmp_path / "run")
    assert set(read_lists(tmp_path / "run")) == set(read_lists(imported))
    flip(tmp_path / "run" / "hf" / "config.json", 5, 1)
    with pytest.raises(UserError, match=r"config\.json is damaged"):
        check_files(tmp_path / "run")


def test_the_checksum_is_of_the_whole_file(tmp_path: Path) -> None:
    import xxhash

    content = random.Random(2).randbytes((16 << 20) + 5)
    (tmp_path / "file").write_bytes(content)
    seen: list[int] = []
    assert checksum(tmp_path / "file", seen.append) == xxhash.xxh3_128_hexdigest(content)
    assert sum(seen) == len(content) and len(seen) == 17
    (tmp_path / "file").unlink()


def test_a_list_that_another_rank_is_writing_is_no_file_of_the_checkpoint(tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(b"1")
    (tmp_path / f".{LIST.format(1)}.77.tmp").write_bytes(b"{")
    (tmp_path / LIST.format(2)).write_bytes(b"{}")
    assert data_files(tmp_path) == [".metadata"]
