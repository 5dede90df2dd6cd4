"""Nothing is half-written: a file or folder gets its final name when it is whole and on disk."""

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from megatron_tsft.errors import UserError
from megatron_tsft.lock import Lock, hold


def fsync_path(path: Path) -> None:
    """Flush one file or folder entry to disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` through a temporary sibling, fsync and rename."""
    # processes of several hosts may write it
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        fsync_path(temporary)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    fsync_path(path.parent)


@contextlib.contextmanager
def new_directory(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty temporary sibling of `path`; on success it becomes `path`, on any error it is
    removed. One process at a time does this for a path: a lock file beside it says who.

    Raises:
        UserError: `path` is a file, or a folder that is not empty, and `overwrite` is False; or
            another process is writing it.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file: name a folder")
    # behind a link, the folder that it names is made or replaced
    named, path = path, path.resolve()
    _refuse_full(named, overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    with hold(path.with_name(f".{path.name}.lock"), str(named)) as lock:
        _refuse_full(named, overwrite)  # another process may have made it since
        yield from _fill(path, lock)


def _refuse_full(path: Path, overwrite: bool) -> None:
    if path.exists() and not overwrite and any(path.iterdir()):
        raise UserError(
            f"{path} exists already: name another folder, delete it, or pass --overwrite"
        )


def _fill(path: Path, lock: Lock) -> Iterator[Path]:
    """Make `path` under its lock: sweep what killed ones left, yield the temporary folder, rename
    it."""
    for left in path.parent.iterdir():
        if left.name.startswith(f".{path.name}.") and left.name.endswith((".partial", ".replaced")):
            shutil.rmtree(left, ignore_errors=True)
    temporary = path.with_name(f".{path.name}.{lock.token}.partial")
    temporary.mkdir()
    try:
        yield temporary
        for folder, _, names in os.walk(temporary):
            for name in names:
                fsync_path(Path(folder) / name)
            fsync_path(Path(folder))
        lock.check()
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    replaced = path.with_name(f".{path.name}.{lock.token}.replaced")
    if path.exists():
        # first aside, then deleted: a folder that is half deleted has not its own name
        os.replace(path, replaced)
    os.replace(temporary, path)
    fsync_path(path.parent)
    shutil.rmtree(replaced, ignore_errors=True)
