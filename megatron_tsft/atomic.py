"""Nothing is half-written: a file or folder gets its final name when it is whole and on disk."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from megatron_tsft.errors import UserError


def fsync_path(path: Path) -> None:
    """Flush one file or folder entry to disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` through a temporary sibling, fsync and rename."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    fsync_path(temporary)
    os.replace(temporary, path)
    fsync_path(path.parent)


@contextlib.contextmanager
def new_directory(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty temporary sibling of `path`; on success it becomes `path`, on any error it is
    removed.

    Raises:
        UserError: `path` is a file, or a folder that is not empty, and `overwrite` is False.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file: name a folder")
    if path.exists() and not overwrite and any(path.iterdir()):
        raise UserError(
            f"{path} exists already: name another folder, delete it, or pass --overwrite"
        )
    path = path.resolve()  # behind a link, the folder that it names is made or replaced
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(
        f".{path.name}.partial"
    )  # a fixed name: the next try clears what a killed one left
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        for folder, _, names in os.walk(temporary):
            for name in names:
                fsync_path(Path(folder) / name)
            fsync_path(Path(folder))
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    replaced = path.with_name(f".{path.name}.replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if path.exists():
        os.replace(
            path, replaced
        )  # first aside, then deleted: a folder that is half deleted has not its own name
    os.replace(temporary, path)
    fsync_path(path.parent)
    shutil.rmtree(replaced, ignore_errors=True)
