"""Whether the folders that were named are trusted with code: not, until a user says `--trust` (a
run: `--tsft-trust`).

Without it, what a checkpoint may make of its pickles is on a list, a tokenizer's or model's own
Python is not run, and links that leave a folder are not followed. It belongs to the process,
because every reader asks, in whichever thread.
"""

import argparse
import contextlib
from collections.abc import Iterator

FLAG = "--trust"
HELP = (
    "trust whoever wrote the folders: run a tokenizer's or model's own Python, read pickles of any"
    " class, follow links out of a folder"
)

_trusted = False


def trusted() -> bool:
    """Whether the user trusts the folders that were named."""
    return _trusted


@contextlib.contextmanager
def trusting(yes: bool) -> Iterator[None]:
    """Inside, folders are trusted where `yes`."""
    global _trusted
    before, _trusted = _trusted, yes
    try:
        yield
    finally:
        _trusted = before


def add_flag(parser: argparse.ArgumentParser) -> None:
    """Give a command its --trust."""
    parser.add_argument(FLAG, action="store_true", help=HELP)
