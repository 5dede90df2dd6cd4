#!/usr/bin/env python3
"""Make a chat data set whose answers can be checked: sums of three to five digits, worked line by
line.

The problems come from reasoning-gym's `chain_sum`; the worked answer, which the generator does not
give, is written here in the wording that the model itself tends to use, and its last line is scored
by the generator's own check.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_tsft.atomic import write_text
from megatron_tsft.errors import UserError

PROBLEM = {"min_terms": 3, "max_terms": 5, "min_digits": 1, "max_digits": 1}

EXAMPLE = """example:
  examples/quickstart/make_data.py --output runs/quickstart/data --train 256 --heldout 64
"""


def worked_answer(expression: str) -> str:
    """'7 - 9 + 2' -> '7 - 9 = -2', '-2 + 2 = 0', 'The answer is 0.', one a line."""
    terms = expression.split()
    total, lines = int(terms[0]), []
    for operator, term in zip(terms[1::2], terms[2::2], strict=True):
        result = total + int(term) if operator == "+" else total - int(term)
        lines.append(f"{total} {operator} {term} = {result}")
        total = result
    return "\n".join([*lines, f"The answer is {total}."])


def problems(count: int, seed: int) -> Iterator[dict[str, Any]]:
    """`count` conversations, no question twice: {"messages": [user, assistant]}.

    Raises:
        UserError: reasoning-gym is missing.
        RuntimeError: the worked answer does not score full marks with the generator (a bug, never
            skipped).
    """
    try:
        import reasoning_gym
    except ImportError:
        raise UserError(
            "reasoning-gym is missing: pip install 'megatron-tsft[quickstart]' or `make setup`"
        ) from None
    # item i depends on seed + i alone; one problem in a thousand or so repeats an earlier one
    generator: Any = reasoning_gym.create_dataset(
        "chain_sum", seed=seed, size=2 * count + 100, **PROBLEM
    )
    seen: set[str] = set()
    for item in generator:
        if item["question"] in seen:
            continue
        seen.add(item["question"])
        answer = worked_answer(item["metadata"]["expression"])
        final = answer.rsplit(" ", 1)[1].rstrip(".")
        if generator.score_answer(final, item) != 1.0:
            raise RuntimeError(f"{item['question']} worked to {final}, expected {item['answer']}")
        yield {
            "messages": [
                {"role": "user", "content": item["question"]},
                {"role": "assistant", "content": answer},
            ]
        }
        if len(seen) == count:
            return
    raise UserError(f"only {len(seen)} different problems exist for {count}: ask for fewer")


def make(train: int, heldout: int, seed: int) -> dict[str, list[dict[str, Any]]]:
    """The two splits; no question is in both, because they divide one list without repeats."""
    rows = list(problems(train + heldout, seed))
    return {"heldout": rows[:heldout], "train": rows[heldout:]}


def main(argv: list[str] | None = None) -> int:
    """Parse, make, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="DIR",
        help="gets train.jsonl and heldout.jsonl",
    )
    parser.add_argument(
        "--train", type=int, default=256, metavar="N", help="problems to train on (default: 256)"
    )
    parser.add_argument(
        "--heldout", type=int, default=64, metavar="N", help="problems to test on (default: 64)"
    )
    parser.add_argument(
        "--seed", type=int, default=1234, help="the same seed makes the same files (default: 1234)"
    )
    args = parser.parse_args(argv)
    try:
        if args.train < 1 or args.heldout < 1:
            raise UserError(
                f"--train {args.train} --heldout {args.heldout}: both must be at least 1"
            )
        splits = make(args.train, args.heldout, args.seed)
        args.output.mkdir(parents=True, exist_ok=True)
        for name, rows in splits.items():
            path = args.output / f"{name}.jsonl"
            write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
            print(f"wrote {path}: {len(rows)} conversations")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.exit(main())
