#!/usr/bin/env python3
"""Time the losses, and measure their memory, against what else computes them: torch, Megatron-Core,
Liger and others.

Each implementation runs in a process of its own, forward and backward, and is first compared with
ours on a few tokens. Writes benchmark_loss.json (every raw time), .md and .png into the output
folder. What cannot run here is named with its reason. A shape TOKENSxVOCABULARY/TP is one shard of
the vocabulary, timed alone unless --tp starts all shards.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_tsft.atomic import write_text
from megatron_tsft.errors import UserError
from shared import command

if TYPE_CHECKING:
    from shared.inputs import Section, Shape
    from shared.measure import Settings

EXAMPLE = """examples:
  benchmarks/loss.py --output runs/benchmark
  benchmarks/loss.py --output runs/benchmark --objectives sft dft \\
      --implementations ours-torch F.cross_entropy
  benchmarks/loss.py --output runs/benchmark --device cuda \\
      --shapes 8192x131072 8192x151936/8 --dtypes bf16
  benchmarks/loss.py --output runs/benchmark --device cpu --shapes 2048x49152 --tp 2
"""
DEFAULT_SHAPES = {"cpu": ["2048x49152"], "cuda": ["8192x131072", "8192x151936/8", "4096x49152"]}
SHAPES_HELP = f"{' '.join(DEFAULT_SHAPES['cpu'])}, on CUDA {' '.join(DEFAULT_SHAPES['cuda'])}"
QUICK_SHAPES = ["64x4096"]
DEFAULT_HIDDEN = {"cpu": 576, "cuda": 4096}
VERSIONS = (
    "torch",
    "triton",
    "megatron-core",
    "liger-kernel",
    "cut-cross-entropy",
    "quack-kernels",
    "flash-attn",
)
VERSIONS += ("transformer-engine",)
COUNT_TIMEOUT = 900  # seconds for counting memory traffic in the interpreter


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; see EXAMPLE."""
    parser = command.parser(__doc__, EXAMPLE)
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for the three files")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), help="default: cuda where there is one"
    )
    parser.add_argument("--shapes", nargs="+", metavar="NxV[/TP]", help=f"default: {SHAPES_HELP}")
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"a small shape, {' '.join(QUICK_SHAPES)}, and one type",
    )
    parser.add_argument("--dtypes", nargs="+", metavar="T", help="bf16, fp32 (default: both)")
    parser.add_argument(
        "--objectives", nargs="+", metavar="O", help="default: all; a wrong name lists them"
    )
    parser.add_argument(
        "--implementations", nargs="+", metavar="I", help="default: all; a wrong name lists them"
    )
    parser.add_argument(
        "--hidden", type=int, metavar="H", help="of the output head (default: 576, on CUDA 4096)"
    )
    parser.add_argument(
        "--tp",
        type=int,
        default=1,
        metavar="N",
        help="processes, a shard each (default: %(default)s)",
    )
    parser.add_argument(
        "--threads", type=int, default=1, metavar="N", help="of a process (default: %(default)s)"
    )
    parser.add_argument(
        "--repeat", type=int, default=5, metavar="N", help="timed steps (default: %(default)s)"
    )
    parser.add_argument(
        "--timeout", type=float, default=600, metavar="S", help="of one row (default: %(default)g)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of the inputs (default: %(default)s)"
    )
    parser.add_argument("--no-progress", action="store_true", help="no progress bar")
    args = parser.parse_args(argv)
    args.command = command.command_line("benchmarks/loss.py", argv)
    return args


def chosen(flag: str, given: list[str] | None, valid: Sequence[str]) -> list[str]:
    """What was given, in the order of what is valid; all of it where nothing was given."""
    for name in given or []:
        if name not in valid:
            raise UserError(f"{flag} {name}: no such name; valid: {', '.join(valid)}")
    return [name for name in valid if given is None or name in given]


def planned_shapes(args: argparse.Namespace, device: str) -> "list[Shape]":
    """Raises UserError where a shape, or a shape with --tp, cannot be."""
    from shared.inputs import Shape

    shapes = []
    for text in args.shapes or (QUICK_SHAPES if args.quick else DEFAULT_SHAPES[device]):
        shape = Shape.parse(text)
        if args.tp > 1 and shape.tp not in (1, args.tp):
            raise UserError(
                f"--shapes {text} is cut into {shape.tp} shards but --tp is {args.tp}: make them"
                " the same"
            )
        shapes.append(
            Shape.parse(f"{shape.tokens}x{shape.vocabulary}/{args.tp}") if args.tp > 1 else shape
        )
    return shapes


def plan(args: argparse.Namespace, device: str) -> "list[tuple[Section, list[str]]]":
    """The sections of a run, each with the implementations that belong to it."""
    from shared.inputs import CHOICES, DTYPES, Section
    from shared.peers import PEERS

    for flag in ("tp", "threads", "repeat"):
        if getattr(args, flag) < 1:
            raise UserError(f"--{flag} {getattr(args, flag)}: it must be at least 1")
    keys = tuple(chosen("--objectives", args.objectives, list(CHOICES)))
    names = chosen("--implementations", args.implementations, list(PEERS))
    dtypes = chosen("--dtypes", args.dtypes, list(DTYPES))[
        : 1 if args.quick and not args.dtypes else None
    ]
    hidden = args.hidden or DEFAULT_HIDDEN[device]
    sections = []
    for shape in planned_shapes(args, device):
        for dtype in dtypes:
            for part in ("logits", "head"):
                of_part = [name for name in names if PEERS[name].part == part]
                if any(set(keys) & set(PEERS[name].keys) for name in of_part):
                    section = Section(shape, dtype, part, hidden, args.tp, args.seed, device, keys)
                    sections.append((section, of_part))
    if not sections:
        raise UserError(
            "none of --implementations computes any of --objectives: nothing to measure"
        )
    return sections


# ---- measuring ----------------------------------------------------------------------------------


def count_traffic() -> dict[str, Any]:
    """Bytes that our Triton kernels move per logit, by objective, from benchmarks/count_traffic.py;
    or why not."""
    tool = Path(__file__).with_name("count_traffic.py")
    variables = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    line = [sys.executable, str(tool), "--json"]
    try:
        done = subprocess.run(
            line, env=variables, capture_output=True, text=True, timeout=COUNT_TIMEOUT
        )
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["no message"]
            why = f"ended with {done.returncode}: {lines[-1][:160]}"
            return {"reason": f"benchmarks/count_traffic.py {why}"}
        return {"bytes": {key: float(value) for key, value in json.loads(done.stdout).items()}}
    except (subprocess.TimeoutExpired, ValueError, AttributeError, TypeError) as error:
        return {"reason": f"benchmarks/count_traffic.py gave no numbers: {type(error).__name__}"}


def row_tasks(section: "Section", names: list[str]) -> list[tuple[str, str, str | None]]:
    """(objective, implementation, why it cannot run) of each row."""
    from shared.peers import PEERS

    rows = []
    for name in names:
        reason = PEERS[name].why_not(section.device, section.world)
        rows += [(key, name, reason) for key in section.keys if key in PEERS[name].keys]
    return rows


def measure_section(
    section: "Section", names: list[str], settings: "Settings", counted: dict, bar: Any
) -> dict:
    """One section's result; a Ctrl-C ends it with what it has, under "interrupted"."""
    from shared.inputs import CHOICES, make_case
    from shared.measure import Task, run
    from shared.targets import floor_ms

    head = section.part == "head"
    result: dict[str, Any] = {
        "name": str(section),
        "shape": str(section.shape),
        "tokens": section.shape.tokens,
        "columns": section.shape.columns,
        "processes": section.world,
        "dtype": section.dtype,
        "part": section.part,
        "hidden": section.hidden if head else None,
        "logits_bytes": section.logits_bytes,
        "rows": [],
    }
    copy: dict[str, Any] = {
        "failed": "products of matrices are not bound by memory" if head else "nothing was run"
    }
    measured: dict[tuple[str, str], dict[str, Any]] = {}
    rows = row_tasks(section, names)
    runnable = [(key, name) for key, name, reason in rows if reason is None]
    try:
        # forks inherit the inputs; more than one process, or a GPU's, make their own
        case = (
            make_case(section)
            if section.device == "cpu" and section.world == 1 and runnable
            else None
        )
        if runnable and not head:
            copy = next(run([Task("", "")], section, settings, case))
        for tasks in batches(runnable, section.device):
            for task, numbers in zip(tasks, run(tasks, section, settings, case), strict=True):
                bar.set_postfix_str(f"{section.dtype} {task.key} {task.peer}")
                bar.update(1 / (2 if section.device == "cpu" else 1))
                measured[task.key, task.peer] = measured.get((task.key, task.peer), {}) | numbers
    except KeyboardInterrupt:
        result["interrupted"] = True
    result["copy_times_ms"] = copy.get("times_ms")
    result["copy_reason"] = copy.get("failed")
    result["copy_ms"] = statistics.median(copy["times_ms"]) if "times_ms" in copy else None
    result["floor_ms"] = {
        key: None if result["copy_ms"] is None else floor_ms(result["copy_ms"], CHOICES[key].passes)
        for key in section.keys
    }
    result["rows"] = [
        record(key, name, reason, measured.get((key, name)), result, counted)
        for key, name, reason in rows
    ]
    add_ratios(result)
    return result


def batches(runnable: list[tuple[str, str]], device: str) -> list[list[Any]]:
    """What one process measures: on a CPU a single number, on a GPU every row of an
    implementation."""
    from shared.measure import Task

    if device == "cpu":
        pairs = (
            ([Task(*row, ("difference", "time"))] for row in runnable),
            ([Task(*row, ("memory",))] for row in runnable),
        )
        return [batch for pair in zip(*pairs, strict=True) for batch in pair]
    names = dict.fromkeys(name for _, name in runnable)
    return [[Task(*row) for row in runnable if row[1] == name] for name in names]


def record(
    key: str,
    name: str,
    reason: str | None,
    numbers: dict[str, Any] | None,
    section: dict[str, Any],
    counted: dict,
) -> dict[str, Any]:
    """A row as it is written: its numbers, or why there are none."""
    row: dict[str, Any] = {
        "objective": key,
        "implementation": name,
        "status": "measured",
        "reason": None,
    }
    ours_triton = name.startswith("ours-triton") and section["part"] == "logits"
    row["bytes_per_logit"] = counted.get("bytes", {}).get(key) if ours_triton else None
    row["logits_bytes"] = section["logits_bytes"]
    if reason is not None:
        return row | {"status": "absent", "reason": reason}
    if numbers is None:
        return row | {"status": "absent", "reason": "interrupted"}
    if "failed" in numbers and "times_ms" not in numbers:
        return row | {"status": "failed", "reason": f"failed: {numbers['failed']}"}
    peak, gradients = numbers.get("peak_bytes"), numbers.get("gradient_bytes", 0)
    return row | {
        "reason": f"memory failed: {numbers['failed']}" if "failed" in numbers else None,
        "times_ms": numbers["times_ms"],
        "median_ms": statistics.median(numbers["times_ms"]),
        "min_ms": min(numbers["times_ms"]),
        "peak_bytes": peak,
        "gradient_bytes": gradients,
        "extra_bytes": None
        if peak is None
        else max(0, peak - gradients),  # beyond the gradients' buffers
        "difference": numbers["difference"],
    }


def add_ratios(section: dict[str, Any]) -> None:
    """Each measured row's time by the floor, by a cross entropy, and by the plain way to compute
    the same loss."""
    times = {
        (r["objective"], r["implementation"]): r["median_ms"]
        for r in section["rows"]
        if r["status"] == "measured"
    }
    cross_entropy = "F.cross_entropy" if section["part"] == "logits" else "matmul+F.cross_entropy"
    for row in section["rows"]:
        if row["status"] != "measured":
            continue
        key, name = row["objective"], row["implementation"]
        same = "plain-autograd" if section["part"] == "logits" else "matmul+ours"
        same += "+teacher-head" if name.endswith("+teacher-head") else ""
        bases = {
            "floor": section["floor_ms"][key],
            "cross_entropy": times.get(("sft", cross_entropy)),
            "same_loss": times.get((key, same)),
        }
        row["ratios"] = {
            base: None if not ms else row["median_ms"] / ms for base, ms in bases.items()
        }


def write(result: dict[str, Any], folder: Path) -> None:
    """The JSON and Markdown files, as far as the run has come."""
    from shared import report

    write_text(folder / "benchmark_loss.json", json.dumps(result, indent=1) + "\n")
    write_text(folder / "benchmark_loss.md", report.markdown(result))


def benchmark(args: argparse.Namespace, device: str) -> dict[str, Any]:
    """The whole run: measure, print and write after each section, then judge the targets and
    draw."""
    from tqdm import tqdm

    from shared import plot, report
    from shared.machine import environment
    from shared.measure import Settings
    from shared.targets import judge

    sections = plan(args, device)
    folder = command.check_output(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": args.command,
        "environment": environment(device, args.threads, VERSIONS),
        "counted": {"reason": "ours-triton is not in this run"},
        "interrupted": False,
        "sections": [],
        "targets": [],
    }
    if any("ours-triton" in names for _, names in sections):
        result["counted"] = count_traffic()
    print(
        *report.environment_lines(result),
        report.EXPLANATION,
        report.counted_line(result["counted"]),
        sep="\n",
    )
    settings = Settings(args.threads, args.repeat, args.timeout)
    total = sum(
        reason is None for section, names in sections for *_, reason in row_tasks(section, names)
    )
    tqdm.monitor_interval = 0  # no thread: the measuring processes are forks
    layout = "{percentage:3.0f}% {elapsed}<{remaining} {postfix}"
    with tqdm(
        total=total, disable=args.no_progress, bar_format=layout, mininterval=1, file=sys.stderr
    ) as bar:
        for section, names in sections:
            found = measure_section(section, names, settings, result["counted"], bar)
            result["sections"].append(found)
            result["interrupted"] = bool(found.pop("interrupted", False))
            result["targets"] = judge(result["sections"], device, args.threads)
            write(result, folder)
            bar.clear()
            print(
                f"\n== {found['name']}", report.text_table(*report.section_table(found)), sep="\n"
            )
            print(*report.section_notes(found), sep="\n", flush=True)
            if result["interrupted"]:
                break
    if result["targets"]:
        print("\n== targets", report.text_table(*report.target_table(result["targets"])), sep="\n")
    plot.draw(result, folder / "benchmark_loss.png")
    names = (f"benchmark_loss.{ending}" for ending in ("json", "md", "png"))
    print(f"\n{command.wrote(folder, *names)}")
    return result


@command.says_errors
def main(argv: list[str] | None = None) -> int:
    """Benchmark; the exit status is 0, 2 for a user's error, 130 after Ctrl-C."""
    args = parse(argv)
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(
        args.threads
    )  # before torch is imported
    import torch

    torch.set_num_threads(1)  # of this process: a fork has none of its parent's threads
    there = torch.cuda.is_available()
    if args.device == "cuda" and not there:
        raise UserError(
            "--device cuda: this machine has no GPU that torch can use: leave --device out"
        )
    result = benchmark(args, args.device or ("cuda" if there else "cpu"))
    return 130 if result["interrupted"] else 0


if __name__ == "__main__":
    sys.exit(main())
