#!/usr/bin/env python3
"""Plants twenty faults in a copy of the package, one at a time, and says which test notices each.

Whoever makes the tests faster runs it before and after: they must catch no less.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGE = "megatron_tsft"
# what runs which tests, the faster first
COMMANDS = {"make test": "not slow and not gpu", "make test-all": "slow and not gpu"}
EXAMPLE = """example:
  dev/seeded_faults.py --output docs/benchmark/seeded_faults.json
  dev/seeded_faults.py --only label-not-shifted --output docs/benchmark/seeded_faults.json"""


@dataclass(frozen=True)
class Fault:
    """A small edit of the package.

    Attributes:
        name: for --only.
        what: what is wrong then, in a sentence.
        snippet: text that stands exactly once in the package, wherever.
        replacement: what stands there instead.
        likely: pytest's arguments for the tests that should notice, the first to be tried first.
    """

    name: str
    what: str
    snippet: str
    replacement: str
    likely: tuple[str, ...]


LOSS = "tests/loss/test_vocab_parallel.py"
PACKS = "tests/data/test_packed_dataset.py"
FAULTS = (
    # ---- loss
    Fault(
        "residual-sign",
        "The kernel adds the residual's part of the gradient, which it must subtract.",
        "g -= pi_row * tl.exp(u - m_pi_row)",
        "g += pi_row * tl.exp(u - m_pi_row)",
        ("tests/loss/test_kernels.py", f"{LOSS} -k triton-tp1"),
    ),
    Fault(
        "padding-counted",
        "Columns of padding count as tokens of the vocabulary.",
        "columns = min(max(self.vocab_size - first, 0), width)",
        "columns = width",
        (f"{LOSS} -k torch-tp1",),
    ),
    Fault(
        "ranks-merged-without-shift",
        "The entropy's sum of a shard is not moved to the common maximum when shards merge.",
        '(old["e"] + old["s"] * by) * factor',
        'old["e"] * factor',
        (f"{LOSS} -k torch-tp2",),
    ),
    Fault(
        "gradient-doubled-on-one-rank",
        "The second tensor-parallel rank writes twice its gradient.",
        "return grad, None, None, None",
        "rank = 0 if problem.tp_group is None else problem.tp_group.rank()\n"
        "        return grad * (1 + (rank == 1)), None, None, None",
        (f"{LOSS} -k torch-tp2",),
    ),
    Fault(
        "head-chunk-missed",
        "The fused head's weight gets no gradient from the first chunk of columns.",
        "grad_weight.add(rows, logits, head.hidden)",
        "rows.start and grad_weight.add(rows, logits, head.hidden)",
        (f"{LOSS} -k fused-tp1",),
    ),
    Fault(
        "weights-not-in-gradient",
        "token_weights change the loss's value and not its gradient.",
        "loss, imitation, residual = (problem.token_weights * x for x in (loss, imitation,"
        " residual))",
        "loss = problem.token_weights * loss",
        (f"{LOSS} -k torch-tp1",),
    ),
    # ---- objectives
    Fault(
        "target-exponents-swapped",
        "Target-SFT gives the teacher the student's exponent, and the student the teacher's.",
        "a=1 - eta, b=eta)",
        "a=eta, b=1 - eta)",
        (f"{LOSS} -k 'torch-tp1 and target-sft'",),
    ),
    Fault(
        "schedule-one-step-early",
        "A scheduled parameter has the next step's value.",
        "max(step / self.steps, 0.0)",
        "max((step + 1) / self.steps, 0.0)",
        ("tests/test_schedules.py",),
    ),
    # ---- data
    Fault(
        "label-not-shifted",
        "A position's label is its own token, not the next one.",
        "np.where(loss_mask[1:], input_ids[1:], IGNORED)",
        "np.where(loss_mask[1:], input_ids[:-1], IGNORED)",
        (PACKS,),
    ),
    Fault(
        "mask-not-shifted",
        "A label is supervised where the token before it is.",
        "self._labels[place] = np.where(loss_mask[1:],",
        "self._labels[place] = np.where(loss_mask[:-1],",
        (PACKS,),
    ),
    Fault(
        "positions-not-reset",
        "Positions count on across the border of two conversations of a pack.",
        "self._positions[self._at : self._at + room] = np.arange(room)",
        "self._positions[self._at : self._at + room] = np.arange(self._at, self._at + room)",
        (PACKS,),
    ),
    Fault(
        "share-of-the-whole",
        "A mixture's later members get their share of all packs from those that are left.",
        "part = round(share / left * PARTS)",
        "part = round(share / sum(shares) * PARTS)",
        ("tests/data/test_blend.py",),
    ),
    Fault(
        "context-parallel-cut",
        "A context-parallel rank's second chunk is the one after its first, not its mirror image.",
        "(2 * size - 1 - rank) * chunk",
        "(size + rank) * chunk",
        ("tests/data/test_context_parallel.py",),
    ),
    # ---- teacher
    Fault(
        "top-k-rows-swapped",
        "The ids of the teacher's most likely tokens are those of another token of the batch.",
        "ids = shards[..., candidates:-2]",
        "ids = shards.roll(1, 1)[..., candidates:-2]",
        ("tests/teacher/test_topk.py",),
    ),
    Fault(
        "record-of-another-conversation",
        "A data set's conversations read each other's cached records.",
        "            places = cache.find(data)\n",
        "            places = np.roll(cache.find(data), 1)\n",
        ("tests/teacher/test_packs_with_teacher.py", "tests/teacher/test_cache_round_trip.py"),
    ),
    # ---- model
    Fault(
        "denominator-of-all-tokens",
        "The loss is divided by all positions, not by the supervised ones.",
        'return rows["loss"].sum(), count.int()',
        'return rows["loss"].sum(), (count * 0 + supervised.numel()).int()',
        ("tests/training/test_against_transformers.py",),
    ),
    Fault(
        "gamma-of-the-residual",
        "gamma in metrics.jsonl is the residual's coefficient.",
        '"imitation" if name == "gamma" else name',
        '"residual" if name == "gamma" else name',
        ("tests/training/test_against_transformers.py", "tests/training/test_mixture.py"),
    ),
    # ---- checkpoint
    Fault(
        "query-and-key-swapped",
        "The converter puts a group's key head before its query heads.",
        "for part in range(3)",
        "for part in (1, 0, 2)",
        ("tests/checkpoint/test_checkpoint_layout.py",),
    ),
    # ---- training
    Fault(
        "reference-taken-early",
        "The reference takes the student's weights a step before it should.",
        "step % self.refresh == 0",
        "(step + 1) % self.refresh == 0",
        ("tests/training/test_reference_refresh.py",),
    ),
    Fault(
        "resume-skips-a-batch",
        "A resumed run drops a micro-batch before each one of its first step.",
        "next(data_iterator)",
        "[next(data_iterator) for _ in range(1 + (0 < training_step() =="
        ' self.__dict__.setdefault("first", training_step())))][-1]',
        ("tests/training/test_resume.py",),
    ),
)


@dataclass(frozen=True)
class Caught:
    """Which test noticed a fault; None: no test that was run."""

    what: str
    file: str
    test: str | None
    command: str | None  # the faster of COMMANDS that runs the test
    seconds: float  # until pytest had stopped at it, its start included


def find(root: Path, fault: Fault) -> Path:
    """The file below `root` that has the fault's snippet.

    Raises:
        SystemExit: none has it, or it stands there more than once.
    """
    files = sorted((root / PACKAGE).rglob("*.py"))
    places = [path for path in files for _ in range(path.read_text().count(fault.snippet))]
    if len(places) != 1:
        raise SystemExit(
            f"error: {fault.name}: {fault.snippet!r} stands {len(places)} times in {PACKAGE}/, not"
            " once: give the fault the line as it is now"
        )
    return places[0]


def copy_of(repository: Path, copy: Path) -> None:
    """The files of a checkout that git knows or would add, as they are now, and its history."""
    subprocess.run(["git", "clone", "-q", "--no-hardlinks", repository, copy], check=True)
    command = ["git", "-C", repository, "ls-files", "-z", "--cached", "--others"]
    listed = subprocess.run([*command, "--exclude-standard"], check=True, stdout=subprocess.PIPE)
    names = {name for name in listed.stdout.decode().split("\0") if name}
    tracked = subprocess.run(
        ["git", "-C", copy, "ls-files", "-z"], check=True, stdout=subprocess.PIPE
    )
    for name in {name for name in tracked.stdout.decode().split("\0") if name} | names:
        source, target = repository / name, copy / name
        if source.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target)
        else:
            target.unlink(missing_ok=True)


def pytest(copy: Path, arguments: Sequence[str], marks: str) -> tuple[str | None, float]:
    """Run tests in the copy up to the first that fails: its id, or None, and the seconds.

    Raises:
        SystemExit: pytest could not run them.
    """
    environment = os.environ | {
        "PYTHONPATH": str(copy),
        "PYTHONDONTWRITEBYTECODE": "1",  # a fault's bytecode must not outlive it
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-rfE"]
    command += ["--hypothesis-profile", "ci"]  # no deadline, whatever else the machine does
    begun = time.monotonic()
    run = subprocess.run(
        [*command, "--tb=line", "-m", marks, *arguments],
        cwd=copy,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    seconds = round(time.monotonic() - begun, 1)
    if run.returncode in (0, 5):  # 5: none of them has these marks
        return None, seconds
    failed = re.search(r"^(?:FAILED|ERROR) (\S+::.*?)(?: - |$)", run.stdout, re.MULTILINE)
    if failed is None:
        raise SystemExit(
            f"error: pytest {shlex.join(arguments)} did not run:\n{run.stdout[-2000:]}"
        )
    return failed[1], seconds


def try_fault(copy: Path, fault: Fault, whole: bool) -> Caught:
    """Plant one fault, run tests until one fails, and see that it passes without the fault."""
    path = find(copy, fault)
    clean = path.read_text()
    file = str(path.relative_to(copy))
    likely = [shlex.split(arguments) for arguments in fault.likely]
    selections = [(arguments, command) for command in COMMANDS for arguments in likely]
    selections += [([], command) for command in COMMANDS if whole]
    passed = 0.0
    for arguments, command in selections:
        path.write_text(clean.replace(fault.snippet, fault.replacement))
        try:
            test, seconds = pytest(copy, arguments, COMMANDS[command])
        finally:
            path.write_text(clean)
        passed += seconds
        if test is None:
            continue
        if pytest(copy, [test], COMMANDS[command])[0] is not None:
            raise SystemExit(f"error: {test} fails without {fault.name} too: mend it first")
        return Caught(fault.what, file, test, command, seconds)
    return Caught(fault.what, file, None, None, round(passed, 1))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", choices=[fault.name for fault in FAULTS],
        help="only these faults",
    )  # fmt: skip
    parser.add_argument(
        "--repository", type=Path, default=REPOSITORY, metavar="DIR",
        help="the checkout to copy; it is not changed (default: this one)",
    )  # fmt: skip
    parser.add_argument(
        "--whole", action="store_true",
        help="where the likely tests notice nothing, run all others",
    )  # fmt: skip
    parser.add_argument(
        "--output", type=Path, metavar="FILE.json",
        help="where results go; faults that were caught there before are not tried again",
    )  # fmt: skip
    args = parser.parse_args(argv)
    chosen = [fault for fault in FAULTS if not args.only or fault.name in args.only]
    results: dict[str, Any] = {}
    if args.output and args.output.is_file():
        results = json.loads(args.output.read_text())
    for fault in chosen:  # before any test runs: a snippet that is not there would be a surprise
        find(args.repository, fault)
    with contextlib.ExitStack() as stack:
        copy: Path | None = None
        for fault in chosen:
            if not results.get(fault.name, {}).get("test"):
                if copy is None:  # made when the first fault needs it
                    copy = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "copy"
                    copy_of(args.repository.resolve(), copy)
                results[fault.name] = dataclasses.asdict(try_fault(copy, fault, args.whole))
            result = results[fault.name]
            where = f"{result['command']}: {result['test']}" if result["test"] else "NOT CAUGHT"
            print(f"{fault.name:32} {result['seconds']:6.1f} s  {where}", flush=True)
            if args.output:
                args.output.write_text(json.dumps(results, indent=2) + "\n")
    missed = [fault.name for fault in chosen if not results[fault.name]["test"]]
    if missed:
        print(f"error: no test notices {', '.join(missed)}: add one", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
