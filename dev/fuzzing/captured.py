"""A command or a reader run as a user would, in this process: what it says, and how it ends."""

import contextlib
import io
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from megatron_tsft.entry import run_command


class Refused(Exception):
    """One line said what was wrong."""


class Fault(Exception):
    """It ended as no command may; `outcome` says how."""

    def __init__(self, outcome: str, detail: str) -> None:
        super().__init__(detail)
        self.outcome = outcome


def read[Result](body: Callable[[], Result]) -> Result:
    """What a reader returns.

    Raises:
        Refused, Fault: it did not.
    """
    found: list[Result] = []

    def run() -> int:
        found.append(body())
        return 0

    command(lambda: run_command(run, name="reading"))
    return found[0]


def survives(body: Callable[[], Any]) -> None:
    """Whatever comes of it, it ends as a command may: for what checksums would have kept from a
    reader.

    Raises:
        Fault: it did not.
    """
    with contextlib.suppress(Refused):
        body()


def command(main: Callable[[], int], makes: Path | None = None) -> str:
    """What a command prints that ends well.

    makes: what it writes, of which nothing may be there where it does not end well.

    Raises:
        Refused: it ended with a line, or, where its status says that something differs, with that.
        Fault: it ended otherwise.
    """
    try:
        return _ended(main)
    except (Refused, Fault) as end:
        left = []
        if makes is not None:  # atomic.py's temporary names begin with a point
            names = (makes.name, f".{makes.name}.*")
            left = [path.name for name in names for path in makes.parent.glob(name)]
        if left:
            raise Fault("half-written", f"{', '.join(left)} is left by: {end}") from end
        raise


def _ended(main: Callable[[], int]) -> str:
    with _captured() as said:
        try:
            status: Any = main()
        except BaseException as error:  # a panic of Rust's is no Exception
            raise Fault("traceback", f"{type(error).__name__}: {error}") from error
        out, err = said()
    last = next((line for line in reversed(err.splitlines()) if line.strip()), "")
    if "Traceback (most recent call last)" in err:
        raise Fault("traceback", err.strip()[-3000:])
    if status == 0:
        return out
    if status == 1 and out.strip():
        raise Refused(out.strip().splitlines()[-1])
    if status == 2 and last.startswith("error: ") and err.count("error: ") == last.count("error: "):
        raise Refused(last)
    raise Fault("traceback", f"status {status}: {err.strip()[-3000:]}")


@contextlib.contextmanager
def _captured() -> Iterator[Callable[[], tuple[str, str]]]:
    """Inside, what is written to standard output and error, by whichever library, is kept."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept, files = [os.dup(1), os.dup(2)], [os.memfd_create("out"), os.memfd_create("err")]

    def said() -> tuple[str, str]:
        sys.stdout.flush()
        sys.stderr.flush()
        texts = []
        for file in files:
            os.lseek(file, 0, os.SEEK_SET)
            with io.FileIO(file, closefd=False) as content:
                texts.append(content.read().decode(errors="replace"))
        return texts[0], texts[1]

    for number, file in enumerate(files, 1):
        os.dup2(file, number)
    try:
        with (
            open(1, "w", closefd=False) as out,
            open(2, "w", closefd=False) as err,
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            yield said
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, file in enumerate(kept, 1):
            os.dup2(file, number)
        for file in kept + files:
            os.close(file)
