#!/usr/bin/env python3
"""Starts two jobs in one place, and kills runs at random moments: what is there afterwards has to
be what one undisturbed job leaves.

`races` starts pairs of the same job: one may win, the other has to say who holds the place, or that
the work is done. `soak` kills ranks and torchrun of one run until it ends, and compares its weights
bit for bit, and its metrics row for row, with a run that nobody disturbed. A soak that was stopped
goes on by the same command.
"""

import argparse
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))
os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

from megatron_tsft.processes import children_of  # noqa: E402
from tests.training.runs import (  # noqa: E402
    make_hf,
    step_values,
    under_torchrun,
    weights,
    write_rows,
)

EXAMPLE = """examples:
  dev/faults.py races --pairs 30 --output docs/benchmark/races.json
  dev/faults.py soak --steps 500 --kills 20 --output docs/benchmark/soak.json
  dev/faults.py races --kind export --pairs 3 --seed 7"""
# what the second of a pair may say
HELD = re.compile(r"^error: .* is in use by process \d+ on \S+ since .*: wait until it has ended")
DONE = re.compile(r"^error: .* exists already|is finished already|which are all of this run")


@dataclass(frozen=True)
class Place:
    """A working folder with a model, prepared data and an imported model."""

    root: Path

    def __getattr__(self, name: str) -> Path:
        return self.root / name


def make_place(root: Path) -> Place:
    """Make it, or find it again."""
    from megatron_tsft.checkpoint.convert import import_hf
    from megatron_tsft.data.prepare import prepare

    place = Place(root)
    if not place.ready.exists():
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir(parents=True)
        make_hf(place.hf)
        import_hf(place.hf, place.base, progress=False)
        prepare(write_rows(root / "rows.jsonl", 300, 0), place.hf, place.train, progress=False)
        place.ready.touch()
    return place


def tool(name: str, *words: object) -> list[str]:
    return [sys.executable, str(REPOSITORY / "tools" / name), *map(str, words)]


# kind -> the command that writes to a target
RACES: dict[str, Callable[[Place, Path], list[str]]] = {
    "export": lambda place, to: tool(
        "convert_checkpoint.py", "export", "--megatron", place.base, "--hf", to, "--no-progress"
    ),
    "import": lambda place, to: tool(
        "convert_checkpoint.py", "import", "--hf", place.hf, "--megatron", to, "--no-progress"
    ),
    "prepare": lambda place, to: tool(
        "prepare_data.py", "--input", place.root / "rows.jsonl", "--tokenizer", place.hf,
        "--output", to,
    ),
    "cache": lambda place, to: tool(
        "cache_teacher.py", "--teacher", place.hf, "--data", place.train, "--output", to,
        "--top-k", "4", "--device", "cpu", "--no-progress",
    ),
    "run": lambda place, to: under_torchrun(
        place.base, place.train, to, 30, "--save-interval", "5", ranks=1
    ),
}  # fmt: skip


def content(folder: Path) -> dict[str, str]:
    """Relative path -> digest of what two equal jobs write alike: tensors, rows, settings."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        # ids, dates and logs differ from job to job, and the lists and cards that hash them
        volatile = re.search(r"(\.metadata|tsft_[a-z]+(\.\d+)?\.json|state\.json|\.txt)$", name)
        if not path.is_file() or volatile or "logs/" in name or "iter_" in name:
            continue
        data = path.read_bytes()
        if path.name == "metrics.jsonl":
            data = json.dumps(rows_of(folder)).encode()
        found[name] = hashlib.sha256(data).hexdigest()
    return found


def start(words: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    with log.open("ab") as file:
        return subprocess.Popen(words, env=environment, stdout=file, stderr=subprocess.STDOUT)


def race(kind: str, place: Place, number: int, draw: random.Random, wanted: Any) -> tuple[str, str]:
    """One pair: (outcome, what the two said)."""
    target = place.root / "races" / f"{kind}-{number}"
    target.parent.mkdir(exist_ok=True)
    logs = [target.with_suffix(f".{i}.txt") for i in range(2)]
    jobs = []
    for log in logs:
        jobs.append(start(RACES[kind](place, target), log))
        time.sleep(draw.choice([0, 0, 0.1, 0.5, 1, 3]) * draw.random())
    codes = [job.wait() for job in jobs]
    said = [log.read_text().strip().splitlines() or [""] for log in logs]
    shown = "\n".join(f"{code}: {lines[-1]}" for code, lines in zip(codes, said, strict=True))
    if 0 not in codes or content(target) != wanted:
        return "broken", shown
    left = [p.name for p in target.parent.iterdir() if p.name.startswith(f".{target.name}")]
    left += [p.name for p in target.glob(".tsft_lock")]
    if left:
        return f"left {left}", shown
    outcome = "both ended well"
    for code, lines in zip(codes, said, strict=True):
        if code:
            held = HELD.search(lines[-1])
            if not held and not DONE.search(lines[-1]):
                return "lost without a word", shown
            outcome = "the second was told who" if held else "the second was told it is there"
        elif codes == [0, 0] and DONE.search("\n".join(lines)):
            outcome = "the second found it done"
    if outcome == "both ended well":
        return "both wrote", shown
    shutil.rmtree(target)
    return outcome, shown


GOOD = {"the second was told who", "the second was told it is there", "the second found it done"}


def races(args: argparse.Namespace) -> int:
    """Print and keep the outcomes of all pairs; 1 where one is not good."""
    place, draw = make_place(args.folder), random.Random(args.seed)
    table: dict[str, Counter[str]] = {}
    for kind in args.kind:
        alone = place.root / f"alone-{kind}"
        shutil.rmtree(alone, ignore_errors=True)
        if start(RACES[kind](place, alone), alone.with_suffix(".txt")).wait():
            raise SystemExit(alone.with_suffix(".txt").read_text())
        wanted, table[kind] = content(alone), Counter()
        for number in range(args.pairs):
            shutil.rmtree(place.root / "races" / f"{kind}-{number}", ignore_errors=True)
            for log in (place.root / "races").glob(f"{kind}-{number}.?.txt"):
                log.unlink()
            outcome, shown = race(kind, place, number, draw, wanted)
            table[kind][outcome] += 1
            if outcome not in GOOD:
                print(f"{kind}, pair {number}: {outcome}\n{shown}", flush=True)
        print(f"{kind}: {args.pairs} pairs: {dict(table[kind])}", flush=True)
    keep(args, {kind: dict(counts) for kind, counts in table.items()})
    return int(any(set(counts) - GOOD for counts in table.values()))


def rows_of(save: Path) -> list[dict[str, Any]]:
    lines = (save / "metrics.jsonl").read_text().splitlines()
    return step_values([json.loads(line) for line in lines])


def step_of(save: Path) -> int:
    try:
        last = (save / "metrics.jsonl").read_text().rpartition("\n")[0].splitlines()[-1]
        return int(json.loads(last)["step"])
    except (OSError, IndexError, ValueError):
        return 0


def soak(args: argparse.Namespace) -> int:
    """Kill a run until it is through; 1 where it ends elsewhere than an undisturbed one."""
    place, draw = make_place(args.folder), random.Random(args.seed)
    flags = ("--pipeline-model-parallel-size", "2", "--save-interval", str(args.save_interval))
    flags += ("--tsft-keep-last", "3", *args.flags)
    calm, save, log = (place.root / name for name in ("calm", "soaked", "soaked.txt"))
    began = time.monotonic()
    if start(
        under_torchrun(place.base, place.train, calm, args.steps, *flags), place.root / "calm.txt"
    ).wait():
        raise SystemExit((place.root / "calm.txt").read_text()[-3000:])
    kills = Counter[str]()
    soaked = under_torchrun(place.base, place.train, save, args.steps, *flags)
    # kills are spread over the whole run: each falls soon after a step drawn before
    marks = sorted(draw.randrange(1, args.steps) for _ in range(args.kills))
    job = start(soaked, log)
    for mark in marks:
        while job.poll() is None and step_of(save) < mark:
            time.sleep(0.02)
        time.sleep(draw.random() * args.spread)
        if job.poll() is not None:
            break
        victims = {"torchrun": job.pid}
        victims |= {f"rank {i}": pid for i, pid in enumerate(children_of(job.pid) or [])}
        name = draw.choice(sorted(victims))
        os.kill(victims[name], signal.SIGKILL)
        kills[name] += 1
        code = job.wait()
        print(f"step {step_of(save)}: killed {name}; torchrun ended with {code}", flush=True)
        job = start(soaked, log)
    code = job.wait()
    same = {
        "exit status": code == 0,
        "weights and optimizer": weights(save, args.steps) == weights(calm, args.steps),
        "metrics": rows_of(save) == rows_of(calm),
        "every step once": [r["step"] for r in rows_of(save)] == list(range(1, args.steps + 1)),
    }
    result = {
        "steps": args.steps,
        "kills": dict(kills),
        "waited for a dying run": log.read_text().count("waiting up to"),
    }
    result |= {"same": same, "seconds": round(time.monotonic() - began)}
    print(json.dumps(result, indent=1))
    keep(args, result)
    return int(not all(same.values()))


def keep(args: argparse.Namespace, result: dict[str, Any]) -> None:
    """Write a result with its seed."""
    if args.output:
        from megatron_tsft.atomic import write_text

        write_text(args.output, json.dumps({"seed": args.seed, **result}, indent=1) + "\n")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("races", "soak"):
        command = commands.add_parser(name)
        command.add_argument("--folder", type=Path, default=Path("runs/faults"), metavar="DIR")
        command.add_argument("--seed", type=int, default=0, metavar="N")
        command.add_argument("--output", type=Path, metavar="FILE", help="keep the figures here")
        if name == "races":
            command.add_argument("--pairs", type=int, default=3, metavar="N")
            command.add_argument("--kind", nargs="+", choices=RACES, default=list(RACES))
        else:
            command.add_argument("--steps", type=int, default=60, metavar="N")
            command.add_argument("--kills", type=int, default=3, metavar="N")
            command.add_argument("--save-interval", type=int, default=10, metavar="N")
            command.add_argument(
                "--spread", type=float, default=2.0, metavar="S",
                help="a kill falls up to S seconds after its step (default: %(default)s)",
            )  # fmt: skip
            command.add_argument("--flags", nargs=argparse.REMAINDER, default=[], metavar="FLAG")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """0 where everything ended as it should."""
    args = parse(argv)
    return {"races": races, "soak": soak}[args.command](args)


if __name__ == "__main__":
    sys.exit(main())
