#!/usr/bin/env python3
"""Print before and after side by side, and fail unless the model really learned."""

import argparse
import json
import sys
import textwrap
from itertools import zip_longest
from pathlib import Path
from typing import Any

from megatron_tsft.errors import UserError

WIDTH = 46  # of one side of the comparison
MIN_PROBLEMS = 32

EXAMPLE = """example:
  examples/quickstart/summary.py --before runs/quickstart/before.json \\
      --after runs/quickstart/after.json
"""


def load(path: Path) -> dict[str, Any]:
    """One file that evaluate.py wrote.

    Raises:
        UserError: it is missing or not such a file.
    """
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        return {
            key: result[key]
            for key in ("data_sha256", "problems", "nll", "exact", "question", "generated")
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is not a result of evaluate.py ({error!r}): run it again"
        ) from error


def table(before: dict[str, Any], after: dict[str, Any]) -> str:
    """The numbers, then the two answers to one question side by side."""

    def row(name: str, left: str, right: str) -> str:
        return f"{name:<34}{left:>14}{right:>14}"

    def exact(result: dict[str, Any]) -> str:
        return f"{result['exact']} of {result['problems']}"

    lines = [
        row("held-out problems", "before", "after"),
        row("nll (nats a token)", f"{before['nll']:.3f}", f"{after['nll']:.3f}"),
        row("exact match (every token argmax)", exact(before), exact(after)),
        "",
        before["question"],
        f"{'-- before ':-<{WIDTH}} | {'-- after ':-<{WIDTH}}",
    ]
    sides = [
        [
            part
            for line in result["generated"].splitlines()
            for part in textwrap.wrap(line, WIDTH) or [""]
        ]
        for result in (before, after)
    ]
    return "\n".join(
        lines + [f"{a:<{WIDTH}} | {b}".rstrip() for a, b in zip_longest(*sides, fillvalue="")]
    )


def shortcomings(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What is missing for a success; empty where the model learned."""
    found = []
    if before["data_sha256"] != after["data_sha256"]:
        found.append("the two results come from different data")
    if before["problems"] < MIN_PROBLEMS:
        found.append(
            f"{before['problems']} problems are too few to tell, {MIN_PROBLEMS} are needed"
        )
    if not after["nll"] <= before["nll"] / 2:  # also true where nll is NaN
        found.append(
            f"held-out nll did not fall by half: {before['nll']:.3f} -> {after['nll']:.3f}"
        )
    if not after["exact"] > before["exact"]:
        found.append(f"exact match did not rise: {before['exact']} -> {after['exact']}")
    return found


def main(argv: list[str] | None = None) -> int:
    """Parse, compare, print; 1 where the model did not learn."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--before", type=Path, required=True, metavar="FILE", help="evaluate.py's JSON of the base"
    )
    parser.add_argument(
        "--after",
        type=Path,
        required=True,
        metavar="FILE",
        help="evaluate.py's JSON of the new model",
    )
    args = parser.parse_args(argv)
    try:
        before, after = load(args.before), load(args.after)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table(before, after))
    found = shortcomings(before, after)
    for text in found:
        print(f"FAILED: {text}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
