"""A disk that is really full, a small tmpfs: one clear line, nothing half-written, and what was
there stays."""

import functools
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_tsft.checkpoint.convert import import_hf

ROOT = Path(__file__).resolve().parents[2]
# one line
FULL = r"error: \w+ stopped: \[Errno 28\] No space left on device.*; nothing is left half-written\n"

# mounts a tmpfs of $1 bytes on $2, which only this process
# and its children see, and becomes the rest
MOUNTED = 'mount -t tmpfs -o size="$1" tmpfs "$2" && shift 2 && exec "$@"'

# Runs one command (import or export of a source) on the disk again and again, each time with
# another number of free bytes, and prints as JSON what each ended with: its exit status, stderr,
# and the names that are on the disk.
ATTEMPTS = """
import contextlib, io, json, os, shutil, sys
from pathlib import Path
from megatron_tsft.checkpoint import convert
from tools.convert_checkpoint import main
kind, source, disk = sys.argv[1], sys.argv[2], Path(sys.argv[3])
target, other, page = disk / "new", disk / "other", 4096
places = {
    "import": ["--hf", source, "--megatron", str(target)],
    "export": ["--megatron", source, "--hf", str(target)],
}
def free():
    return os.statvfs(disk).f_bfree * page
def attempt(space, *flags):
    other.unlink(missing_ok=True)
    other.write_bytes(bytes(free() - space))  # what somebody else keeps there
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        status = main([kind, *places[kind], "--no-progress", *flags])
    left = sorted(path.name for path in disk.iterdir() if path != other)
    return [status, errors.getvalue(), left]
def content():
    files = [path for path in target.rglob("*") if path.is_file()]
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}
size = free()
report = {"too small": attempt(size)}
# as where somebody else fills the disk a moment later
convert._check_space = lambda target, needed: None
report["alone"] = attempt(size)
used = size - free()
before = content()
spaces = sorted({*range(0, used, 16 * page), *range(used - 16 * page, used, page)})
report["over"] = [attempt(space, "--overwrite") for space in spaces[::4]]
report["kept"] = len(before) > 3 and content() == before
shutil.rmtree(target)
report["filling up"] = [attempt(space) for space in spaces]
report["just enough"] = attempt(used + page)  # which the lock takes
print(json.dumps(report))
"""


@functools.cache
def unshare(place: str) -> list[str] | None:
    """The command that gives a process mounts of its own; None where the system forbids it."""
    for line in (["unshare", "--mount"], ["unshare", "--map-root-user", "--mount"]):
        try:
            done = subprocess.run(
                [*line, "sh", "-c", MOUNTED, "sh", "65536", place, "true"], capture_output=True
            )
        except OSError:
            return None
        if done.returncode == 0:
            return line
    return None


@pytest.mark.parametrize("kind", ["import", "export"])
def test_a_disk_that_is_full_at_any_moment(
    kind: str, make_hf: Callable[..., Path], tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    prefix = unshare(str(disk))
    if prefix is None:
        pytest.skip("this system lets a test mount no tmpfs (unshare --mount)")
    source = make_hf(tokenizer=True)
    if kind == "export":
        import_hf(source, tmp_path / "megatron", progress=False)
        source = tmp_path / "megatron"
    line = [
        *prefix,
        "sh",
        "-c",
        MOUNTED,
        "sh",
        str(4 * 2**20),
        str(disk),
        sys.executable,
        "-c",
        ATTEMPTS,
        kind,
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*line, str(source), str(disk)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)

    status, error, names = report["too small"]
    assert status == 2 and names == []
    assert (
        error.startswith(f"error: {disk} has 0.00 GB free, new needs ") and error.count("\n") == 1
    )
    assert report["alone"] == [0, "", ["new"]]
    assert len(report["filling up"]) > 20
    assert report["just enough"] == [0, "", ["new"]]
    for attempts, left in ((report["filling up"], []), (report["over"], ["new"])):
        for status, error, names in attempts:
            assert status == 2 and re.fullmatch(FULL, error) and kind in error and names == left, (
                error
            )
    assert report["kept"]
