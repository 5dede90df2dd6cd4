"""A name never holds something half-written, whatever stops the writer, and a link stays a link."""

import os
import shutil
from pathlib import Path

import pytest

from megatron_tsft.atomic import new_directory, write_text
from megatron_tsft.errors import UserError


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "target"
    with pytest.raises(KeyboardInterrupt), new_directory(target) as folder:
        (folder / "half").touch()
        raise KeyboardInterrupt
    assert list(target.parent.iterdir()) == []
    with new_directory(target) as folder:
        (folder / "a").write_text("whole")
        assert not target.exists()
    assert (target / "a").read_text() == "whole" and list(target.parent.iterdir()) == [target]


def test_what_is_there_is_kept_unless_asked(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    with new_directory(target) as folder:  # an empty folder is in nobody's way
        (folder / "a").write_text("old")
    with pytest.raises(UserError, match="exists already"), new_directory(target):
        raise AssertionError("not reached")
    with pytest.raises(ZeroDivisionError), new_directory(target, overwrite=True):
        raise ZeroDivisionError
    assert (target / "a").read_text() == "old"
    with new_directory(target, overwrite=True) as folder:
        (folder / "b").touch()
    assert [path.name for path in target.iterdir()] == ["b"] and list(tmp_path.iterdir()) == [
        target
    ]
    with pytest.raises(UserError, match="is a file"), new_directory(target / "b", overwrite=True):
        raise AssertionError("not reached")


def test_a_writer_killed_while_it_deletes_the_old_folder_leaves_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "target"
    with new_directory(target) as folder:
        (folder / "a").write_text("old")
    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt), new_directory(target, overwrite=True) as folder:
        (folder / "a").write_text("new")
    monkeypatch.undo()
    assert (target / "a").read_text() == "new"
    with new_directory(target, overwrite=True) as folder:
        (folder / "c").touch()
    assert list(tmp_path.iterdir()) == [target]  # what the killed one left is gone


def killed(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_behind_a_link_the_folder_itself_is_made(tmp_path: Path) -> None:
    disk, link = tmp_path / "disk" / "folder", tmp_path / "link"
    disk.mkdir(parents=True)
    link.symlink_to(disk)
    for name in "ab":
        with new_directory(link, overwrite=True) as folder:
            (folder / name).touch()
        assert link.is_symlink() and [path.name for path in disk.iterdir()] == [name]


def test_a_file_is_replaced_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_text(path, "old")
    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_text(path, "new")
    assert path.read_text() == "old"
    monkeypatch.undo()
    write_text(path, "n\u00e9w")
    assert path.read_text(encoding="utf-8") == "n\u00e9w"


def test_one_writer_at_a_time_and_the_second_is_told(tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    link.symlink_to(target)
    with new_directory(target) as folder:
        (folder / "a").touch()
        for name in (target, link):  # by any name
            with (
                pytest.raises(UserError, match=f"{name} is in use by process {os.getpid()} on"),
                new_directory(name, overwrite=True),
            ):
                raise AssertionError("not reached")
        with new_directory(tmp_path / "target.b"):  # whose name begins like it
            pass
    assert [path.name for path in target.iterdir()] == ["a"]
    assert {path.name for path in tmp_path.iterdir()} == {"target", "target.b", "link"}


def test_what_killed_writers_left_is_swept(tmp_path: Path) -> None:
    for name in (".target.partial", ".target.0a.partial", ".target.0a.replaced"):
        (tmp_path / name).mkdir()
    with new_directory(tmp_path / "target") as folder:
        (folder / "a").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_a_writer_that_was_robbed_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="was taken over"), new_directory(tmp_path / "target"):
        (tmp_path / ".target.lock").write_text("{}")
    assert [path.name for path in tmp_path.iterdir()] == [".target.lock"]


def test_a_file_that_could_not_be_written_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        write_text(tmp_path / "file", "text")
    assert list(tmp_path.iterdir()) == []


def full(descriptor: int) -> None:
    raise OSError(28, "no space")
