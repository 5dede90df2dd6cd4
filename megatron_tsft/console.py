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

from megatron_tsft.errors import UserError

# of all that others say, what a person needs
KEPT = re.compile(
    r"successfully (saved|loaded) checkpoint|^\[?exiting program|out of memory|^error:"
)
TAIL = 20  # lines of a log that nobody keeps, shown where a defect ends the run


class _Sieve(io.TextIOBase):
    """A stream into the log that shows the lines which a person needs on the screen, too."""

    def __init__(self, log: TextIO, screen: TextIO):
        self._log, self._screen, self._line = log, screen, ""
        self.last = ""  # line that is not empty

    def write(self, text: str) -> int:
        self._log.write(text)
        *lines, self._line = (self._line + text).split("\n")
        for line in lines:
            self.last = line.strip() or self.last
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

    def __getattr__(self, name: str) -> Any:
        """`buffer`, `reconfigure` and what else a text stream has."""
        return getattr(self._log, name)


class _Quiet:
    """The state of a console that is quiet: the screen's two streams and the log's place."""

    def __init__(self) -> None:
        self.screen, self.errors = _copy(1), _copy(2)
        self.file: Any = tempfile.TemporaryFile(buffering=0)
        self.path: Path | None = None

    def redirect(self) -> None:
        """Send the descriptors into the log's file."""
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(self.file.fileno(), 1)
        os.dup2(self.file.fileno(), 2)

    def show_tail(self) -> None:
        """What a log that nobody keeps ends with, on the screen."""
        self.file.seek(0)
        lines = self.file.read().decode("utf-8", "replace").splitlines()[-TAIL:]
        self.errors.write("".join(f"| {line}\n" for line in lines))

    def end(self) -> None:
        """Give the descriptors back; a screen that is gone does not matter any more."""
        os.dup2(self.screen.fileno(), 1)
        os.dup2(self.errors.fileno(), 2)
        for stream in (self.screen, self.errors, self.file):
            with contextlib.suppress(OSError):
                stream.close()


def _copy(descriptor: int) -> TextIO:
    """A stream of its own on what a descriptor leads to."""
    return open(os.dup(descriptor), "w", buffering=1, errors="backslashreplace")


def _open_streams() -> tuple[TextIO, TextIO]:
    """Standard output and error; /dev/null where the process was started without them."""
    for descriptor in (1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            null = os.open(os.devnull, os.O_WRONLY)
            if null != descriptor:
                os.dup2(null, descriptor)
                os.close(null)
    if sys.stdout is None:
        sys.stdout = open(1, "w", closefd=False)
    if sys.stderr is None:
        sys.stderr = open(2, "w", closefd=False)
    for stream in (sys.stdout, sys.stderr):
        # a killed process loses no line, and no name is unprintable
        if isinstance(stream, io.TextIOWrapper):
            # a stream whose file has become a pipe cannot be asked where it is
            with contextlib.suppress(OSError):
                stream.reconfigure(line_buffering=True, errors="backslashreplace")
    return sys.stdout, sys.stderr


_quiet: list[_Quiet] = []


@contextlib.contextmanager
def quiet(verbose: bool = False) -> Iterator[None]:
    """The screen gets what `say` says and what KEPT matches; everything else goes to the log.

    verbose: all of it goes to the screen, as without this.
    """
    streams = _open_streams()
    if verbose or _quiet:
        yield
        return
    state = _Quiet()
    _quiet.append(state)
    state.redirect()
    sys.stdout = _Sieve(streams[0], state.screen)
    sys.stderr = _Sieve(streams[1], state.screen)
    try:
        yield
    except Exception as error:
        if state.path is None and not isinstance(error, (UserError, OSError)):
            state.show_tail()
        raise
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        sys.stdout, sys.stderr = streams
        _quiet.clear()
        state.end()


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


def last_words() -> str:
    """The last line that others have printed; "" where that is not known."""
    return sys.stdout.last if isinstance(sys.stdout, _Sieve) else ""


def say(*lines: str) -> None:
    """Show lines to the person on the screen, and keep them in the log."""
    text = "".join(f"{line}\n" for line in lines)
    if _quiet:
        sys.stdout.flush()
        os.write(1, text.encode("utf-8", "backslashreplace"))
        _quiet[0].screen.write(text)
        _quiet[0].screen.flush()
    else:
        sys.stdout.write(text)
        sys.stdout.flush()


def stream() -> TextIO:
    """Where progress bars and warnings go that a person should see."""
    return _quiet[0].errors if _quiet else sys.stderr
