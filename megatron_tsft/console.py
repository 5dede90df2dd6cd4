"""What a person sees, and where the rest goes: a run's own lines on the screen, all that Megatron
and torch say in a log file.

The log begins in memory, because the libraries speak while they are imported and the save folder is
known later; `keep_log` moves it there. File descriptors 1 and 2 are redirected, so that compiled
code and child processes write into the log, too.
"""

import contextlib
import io
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

# of all that others say, what a person needs
KEPT = re.compile(
    r"successfully (saved|loaded) checkpoint|^exiting program at|exiting program after"
    r"|received signal|out of memory|^error:"
)


class _Sieve(io.TextIOBase):
    """A stream into the log that shows the lines which a person needs on the screen, too."""

    def __init__(self, log: TextIO, screen: TextIO):
        self._log, self._screen, self._line = log, screen, ""

    def write(self, text: str) -> int:
        self._log.write(text)
        *lines, self._line = (self._line + text).split("\n")
        for line in lines:
            if KEPT.search(line):
                self._screen.write(line.strip() + "\n")
                self._screen.flush()
        return len(text)

    def flush(self) -> None:
        self._log.flush()

    def fileno(self) -> int:
        return self._log.fileno()

    def isatty(self) -> bool:
        return False

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._log.encoding


class _Quiet:
    """The state of a console that is quiet: the screen's two streams and the log's place."""

    def __init__(self) -> None:
        self.screen = open(os.dup(1), "w", buffering=1)  # noqa: SIM115  # closed by `quiet`
        self.errors = open(os.dup(2), "w", buffering=1)  # noqa: SIM115
        self.file: Any = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115
        self.path: Path | None = None

    def redirect(self) -> None:
        """Send the descriptors into the log's file."""
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(self.file.fileno(), 1)
        os.dup2(self.file.fileno(), 2)


_quiet: list[_Quiet] = []


@contextlib.contextmanager
def quiet(verbose: bool = False) -> Iterator[None]:
    """The screen gets what `say` says and what KEPT matches; everything else goes to the log.

    verbose: all of it goes to the screen, as without this.
    """
    if verbose or _quiet:
        yield
        return
    state, streams = _Quiet(), (sys.stdout, sys.stderr)
    _quiet.append(state)
    state.redirect()
    sys.stdout = _Sieve(streams[0], state.screen)
    sys.stderr = _Sieve(streams[1], state.screen)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = streams
        os.dup2(state.screen.fileno(), 1)
        os.dup2(state.errors.fileno(), 2)
        _quiet.clear()
        for stream in (state.screen, state.errors, state.file):
            stream.close()


def keep_log(path: Path, title: str) -> None:
    """Write the log, with what it holds already, at the end of a file; `title` begins it."""
    if not _quiet:
        return
    state = _quiet[0]
    path.parent.mkdir(parents=True, exist_ok=True)
    before = state.file
    state.file, state.path = path.open("ab", buffering=0), path
    state.file.write(f"\n==== {time.strftime('%Y-%m-%d %H:%M:%S')} {title}\n".encode())
    sys.stdout.flush()
    before.seek(0)
    state.file.write(before.read())
    state.redirect()
    before.close()


def log_path() -> Path | None:
    """The file that the log is written to; None where there is none."""
    return _quiet[0].path if _quiet else None


def say(*lines: str) -> None:
    """Show lines to the person on the screen, and keep them in the log."""
    text = "".join(f"{line}\n" for line in lines)
    if _quiet:
        sys.stdout.flush()
        os.write(1, text.encode())
        _quiet[0].screen.write(text)
        _quiet[0].screen.flush()
    else:
        sys.stdout.write(text)
        sys.stdout.flush()


def stream() -> TextIO:
    """Where progress bars and warnings go that a person should see."""
    return _quiet[0].errors if _quiet else sys.stderr
