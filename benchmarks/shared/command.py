"""What every benchmark is as a command: its parser, its errors, its output folder, and the command
line that its page shows."""

import argparse
import functools
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_tsft.errors import UserError

Main = Callable[[list[str] | None], int]


def parser(description: str | None, example: str) -> argparse.ArgumentParser:
    """A parser whose help shows both texts as they stand; flags are written out in full, so that a
    recorded command says what it means."""
    return argparse.ArgumentParser(
        description=description,
        epilog=example,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def says_errors(main: Main) -> Callable[..., int]:
    """`main(argv=None)`, which returns an exit status, with 2 and one line for a UserError and 130
    after Ctrl-C."""

    @functools.wraps(main)
    def wrapped(argv: list[str] | None = None) -> int:
        try:
            return main(argv)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("interrupted: every file that was written before is whole", file=sys.stderr)
            return 130

    return wrapped


def command_line(script: str, argv: Sequence[str] | None) -> str:
    """The command as it was given, to be started again; of the output folder only the name, so that
    a published page names no path of one machine.

    Args:
        script: its path in the repository.
        argv: the words after it; None stands for those of this process.
    """
    words, kept = list(sys.argv[1:] if argv is None else argv), [script]
    for before, word in zip(["", *words], words, strict=False):
        flag, equals, folder = word.partition("=")
        if before == "--output":
            word = Path(word).name
        elif flag == "--output" and equals:
            word = f"{flag}={Path(folder).name}"
        kept.append(word)
    return shlex.join(kept)


def check_output(output: str) -> Path:
    """The folder that --output names; raises UserError where that is a file."""
    folder = Path(output)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output {folder} is a file: name a folder")
    return folder


def wrote(folder: Path, *names: str) -> str:
    """The last line of a benchmark that wrote files: which, and in which folder, by its whole
    name."""
    return f"wrote {', '.join(names)} into {folder.resolve()}"
