#!/usr/bin/env python3
"""Damages small real inputs of every kind, one fault at a time, and has commands and readers read
them.

Whatever was done to a file, the answer is one line that says what is wrong, or the same result as
before. Of conversations also another one, where text was edited. Anything else is a fault, and is
printed with the command that shows it again.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}

from fuzzing.cases import (  # noqa: E402
    ALLOWED,
    OUTCOMES,
    Case,
    Ended,
    import_everything,
    prepare_targets,
    run_case,
    run_cases,
)
from fuzzing.targets import TARGETS  # noqa: E402

EXAMPLE = """examples:
  dev/fuzz.py --cases 13000 --output docs/benchmark/fuzz.json
  dev/fuzz.py --target hf cards --seed 7 --seconds 60
  dev/fuzz.py --target hf --seed 7 --case 123"""
SHOWN = 1500  # characters of what a fault said


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--target", nargs="+", choices=TARGETS, default=list(TARGETS), metavar="NAME",
        help=f"what is damaged, of {', '.join(TARGETS)} (default: each in turn)",
    )  # fmt: skip
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N",
        help="another seed has other cases (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--cases", type=int, default=1300, metavar="N",
        help="how many, shared evenly by the targets (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--seconds", type=float, metavar="N", help="begin no case later than that",
    )  # fmt: skip
    parser.add_argument(
        "--case", type=int, metavar="N",
        help="show this one alone, of one target, and keep its files",
    )  # fmt: skip
    parser.add_argument(
        "--workers", type=int, default=2, metavar="N",
        help="how many processes have cases (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="where results go")
    return parser.parse_args(argv)


def cases(args: argparse.Namespace, until: float) -> Iterator[Case]:
    """The targets in turn, until there are enough or it is late."""
    for turn in range(args.cases):
        if time.monotonic() > until:
            return
        number, target = divmod(turn, len(args.target))
        yield Case(args.target[target], args.seed, number)


def command_of(ended: Ended) -> str:
    case = ended.case
    return f"dev/fuzz.py --target {case.target} --seed {case.seed} --case {case.number}"


def show(ended: Ended) -> None:
    print(f"\n{ended.outcome}: {command_of(ended)}\n  {ended.done}\n  {ended.detail[-SHOWN:]}")


def table(counts: Counter[tuple[str, str]], targets: Sequence[str]) -> str:
    """Cases by target and outcome."""
    used = [name for name in OUTCOMES if any(counts[target, name] for target in targets)]
    rows = [["target", *used, "all"]]
    for target in targets:
        own = [counts[target, name] for name in used]
        rows.append([target, *map(str, own), str(sum(own))])
    sums = [sum(counts[target, name] for target in targets) for name in used]
    rows.append(["all", *map(str, sums), str(sum(sums))])
    return "\n".join(
        "  ".join([f"{row[0]:14}", *(f"{cell:>12}" for cell in row[1:])]) for row in rows
    )


def run_all(args: argparse.Namespace, work: Path) -> int:
    """Every case; 1 where there is a fault."""
    start = last = time.monotonic()
    until = start + (args.seconds if args.seconds is not None else float("inf"))
    counts, faults, slowest = Counter[tuple[str, str]](), list[Ended](), 0.0
    for ended in run_cases(work, cases(args, until), args.workers):
        counts[ended.case.target, ended.outcome] += 1
        slowest = max(slowest, ended.seconds)
        if ended.outcome not in ALLOWED:
            faults.append(ended)
            show(ended)
        if time.monotonic() - last > 10:
            last = time.monotonic()
            print(f"{counts.total()} cases, {len(faults)} faults, {last - start:.0f} s", flush=True)
    seconds = time.monotonic() - start
    print(f"\n{table(counts, args.target)}")
    print(f"seed {args.seed}, {seconds:.0f} s, the slowest case {slowest:.1f} s")
    if args.output:
        outcomes = {
            target: {name: counts[target, name] for name in OUTCOMES if counts[target, name]}
            for target in args.target
        }
        results = {"seed": args.seed, "cases": counts.total(), "seconds": round(seconds)}
        results |= {"outcomes": outcomes, "faults": [asdict(fault) for fault in faults]}
        args.output.write_text(json.dumps(results, indent=2) + "\n")
    if faults:
        print(f"error: {len(faults)} cases ended as none may: see above", file=sys.stderr)
    return 1 if faults else 0


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    if args.case is not None and len(args.target) != 1:
        print("error: --case is of one --target: name it", file=sys.stderr)
        return 2
    import_everything()
    if args.case is not None:
        work = Path(tempfile.mkdtemp(prefix="fuzz-"))
        prepare_targets(work, args.target)
        ended = run_case(work, Case(args.target[0], args.seed, args.case), work / "case")
        show(ended)
        print(f"  its files: {work / 'case'}")
        return 0 if ended.outcome in ALLOWED else 1
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        prepare_targets(Path(name), args.target)
        return run_all(args, Path(name))


if __name__ == "__main__":
    sys.exit(main())
