#!/usr/bin/env python3
"""A model on paper, nothing measured: what the losses and a teacher add to a training step on GPUs,
up to thousands.

It multiplies what is counted (bytes a logit, messages, operations, products) by what is assumed of
the hardware; every assumption is printed and can be replaced with --assume. Plain SFT is
Megatron-Core's own vocabulary-parallel cross entropy in the same step. Scaling is weak: every
data-parallel rank has --micro-batches, whatever their number.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from megatron_tsft.atomic import write_text
from megatron_tsft.errors import UserError
from shared import command
from shared.paper import ASSUMED, GPUS, LOSSES, MODELS, PLAIN, Run
from shared.report import markdown_table

EXAMPLE = """examples:
  benchmarks/model_scaling.py --model llama3-8b --gpu h100 --gpus 8 64 512 4096
  benchmarks/model_scaling.py --model llama3-70b --tp 8 --pp 4 --micro-batches 32 \\
      --teacher qwen3-32b --fuse-head
  benchmarks/model_scaling.py --assume mfu=0.55 operation_us=6
"""


def plan(args: argparse.Namespace, model: str, gpu: str, gpus: int, **changes: Any) -> Run:
    """One run of the command line. Raises UserError where the GPUs cannot be laid out so."""
    of, assumed = (
        MODELS[model],
        {name: value for name, (value, _) in ASSUMED.items()} | args.assumed,
    )
    run = Run(
        of,
        GPUS[gpu],
        gpus,
        changes.get("tp", args.tp or of.tp),
        args.pp or of.pp,
        changes.get("cp", args.cp),
        args.tokens,
        args.micro_batches,
        MODELS[args.teacher or model],
        args.fuse_head,
        args.recompute,
        assumed,
    )
    if min(run.tp, run.pp, run.cp, run.n, run.micro_batches) < 1 or run.tp > assumed["node"]:
        raise UserError(
            "--tp, --pp, --cp, --tokens, --micro-batches: at least 1, and TP inside a node"
        )
    return run


def step_row(args: argparse.Namespace, model: str, gpu: str, gpus: int) -> dict[str, Any]:
    """A whole step on `gpus` GPUs; its layout is None where they are too few."""
    run = plan(args, model, gpu, gpus)
    row: dict[str, Any] = {"model": model, "gpu": gpu, "gpus": gpus}
    if run.dp < 1 or run.gpus % (run.tp * run.pp * run.cp):
        return row | {"layout": None}
    plain = run.step(LOSSES[PLAIN])
    sizes = {name: run.state_gb(LOSSES[name]) for name in (PLAIN, *args.losses)}
    return row | {
        "layout": [run.tp, run.pp, run.cp, run.dp],
        "plain_ms": 1e3 * plain,
        "gradients_ms": [1e3 * t for t in run.gradients()],
        "logging_ms": 1e3 * (run.logging(LOSSES["sft"]) - run.logging(LOSSES[PLAIN])),
        "against_plain": {name: run.step(LOSSES[name]) / plain - 1 for name in args.losses},
        "state_gb": sizes,
        "too_large": [name for name, size in sizes.items() if size > run.gpu.hbm_gb],
    }


def part_row(run: Run, model: str, gpu: str, name: str) -> dict[str, Any]:
    """What one loss is made of in a micro-batch, and its share of the step."""
    loss = LOSSES[name]
    found = {key: 1e3 * t for key, t in run.loss(loss).items()}
    return {
        "model": model,
        "gpu": gpu,
        "loss": name,
        "layout": [run.tp, run.pp, run.cp],
        "ms": found,
        "teacher_ms": 1e3 * sum(run.teacher_parts(loss).values()),
        "share": run.micro_batches * sum(found.values()) / 1e3 / run.step(loss),
        "stage_message": run.width(loss) / run.model.hidden,
    }


def growth_row(args: argparse.Namespace, tp: int, cp: int) -> dict[str, Any]:
    """A micro-batch's losses at another TP and CP, for the first model and GPU."""
    run = plan(args, args.model[0], args.gpu[0], max(args.gpus), tp=tp, cp=cp)
    return {
        "tp": tp,
        "cp": cp,
        "columns": run.columns,
        "tokens": run.n,
        "iw_sft_ms": 1e3 * run.over_context(),
        "ms": {
            name: {k: 1e3 * t for k, t in run.loss(LOSSES[name]).items()}
            for name in (PLAIN, *args.losses)
        },
    }


def calculate(args: argparse.Namespace) -> dict[str, Any]:
    """Every number of the tables, milliseconds. Raises UserError where no model fits the GPUs."""
    parts, steps = [], []
    for model, gpu in ((m, g) for m in args.model for g in args.gpu):
        steps += [step_row(args, model, gpu, gpus) for gpus in args.gpus]
        run = plan(args, model, gpu, max(args.gpus))
        if run.dp >= 1:
            parts += [part_row(run, model, gpu, name) for name in (PLAIN, *args.losses)]
    if not parts:
        raise UserError(
            f"--gpus {' '.join(map(str, args.gpus))}: too few for TP x PP x CP of these models"
        )
    tp = args.tp or MODELS[args.model[0]].tp
    sizes = [(n, args.cp) for n in (1, 2, 4, 8)] + [(tp, n) for n in (2, 4, 8, 16)]
    return {
        "command": args.command,
        "first": (args.model[0], args.gpu[0]),
        "assumed": {
            name: [args.assumed.get(name, value), source]
            for name, (value, source) in ASSUMED.items()
        },
        "parts": parts,
        "steps": steps,
        "growth": [growth_row(args, *size) for size in sizes],
    }


def percent(x: float | None, sign: str = "") -> str:
    return "-" if x is None else f"{100 * x:{sign}.2f}%"


def assumption_tables(result: dict[str, Any]) -> dict[str, str]:
    """What was assumed of the run, and of the GPUs."""
    rows = [[name, f"{value:g}", source] for name, (value, source) in result["assumed"].items()]
    gpus = [[name, *(f"{x:g}" for x in vars(gpu).values())] for name, gpu in GPUS.items()]
    head = [
        "GPU, data sheet",
        "bf16 TFLOP/s, dense",
        "HBM TB/s",
        "HBM GB",
        "NVLink GB/s, a direction",
    ]
    return {
        "assumptions": markdown_table(["assumption", "value", "source"], rows),
        "gpus": markdown_table(head, gpus),
    }


def parts_table(result: dict[str, Any]) -> str:
    """A line a loss: what a micro-batch of it is made of."""
    names = list(result["parts"][-1]["ms"])
    head = ["model, GPU, TP x PP x CP", "loss", *names]
    head += ["sum, ms", "of the step", "teacher, ms", "stage messages"]
    rows = []
    for row in result["parts"]:
        rows.append(
            [
                f"{row['model']}, {row['gpu']}, {' x '.join(map(str, row['layout']))}",
                row["loss"],
                *(f"{row['ms'][name]:.3f}" if name in row["ms"] else "-" for name in names),
                f"{sum(row['ms'].values()):.3f}",
                percent(row["share"]),
                f"{row['teacher_ms']:.1f}" if row["teacher_ms"] else "-",
                f"x {row['stage_message']:g}",
            ]
        )
    return markdown_table(head, rows)


def steps_table(result: dict[str, Any]) -> str:
    """A line a number of GPUs: whole steps against plain SFT's."""
    losses = next((list(row["against_plain"]) for row in result["steps"] if row["layout"]), [])
    head = ["model, GPU", "GPUs", "TP x PP x CP x DP", "plain step, ms", "logging more, ms"]
    head += [*losses, "GB a GPU, plain / most"]
    rows = []
    for row in result["steps"]:
        start = [f"{row['model']}, {row['gpu']}", str(row["gpus"])]
        if not row["layout"]:
            rows.append([*start, "too few GPUs", *["-"] * (len(head) - 3)])
            continue
        ratios = [
            percent(x, "+") + (" (*)" if name in row["too_large"] else "")
            for name, x in row["against_plain"].items()
        ]
        numbers = [
            " x ".join(map(str, row["layout"])),
            f"{row['plain_ms']:.0f}",
            f"{row['logging_ms']:.2f}",
        ]
        most = max(row["state_gb"].values())
        rows.append([*start, *numbers, *ratios, f"{row['state_gb'][PLAIN]:.0f} / {most:.0f}"])
    return markdown_table(head, rows)


def growth_table(result: dict[str, Any]) -> str:
    """A line a layout: the losses over TP and CP."""
    head = ["TP", "CP", "columns", "tokens", *result["growth"][0]["ms"], "iw-sft's message over CP"]
    rows = [
        [
            *(str(row[k]) for k in ("tp", "cp", "columns", "tokens")),
            *(f"{sum(parts.values()):.3f}" for parts in row["ms"].values()),
            f"{row['iw_sft_ms']:.3f}",
        ]
        for row in result["growth"]
    ]
    return markdown_table(head, rows)


def tables(result: dict[str, Any]) -> dict[str, str]:
    """By title, in Markdown."""
    return assumption_tables(result) | {
        "parts": parts_table(result),
        "steps": steps_table(result),
        "growth": growth_table(result),
    }


def draw(result: dict[str, Any], path: Path) -> None:
    """What a micro-batch's loss is made of over TP, and the step over the number of GPUs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    rows = result["growth"][:4]
    for place, name in enumerate(rows[0]["ms"]):
        bottom = [0.0] * len(rows)
        for number, part in enumerate(rows[0]["ms"][name]):
            heights, x = (
                [row["ms"][name][part] for row in rows],
                [5 * i + 0.5 * place for i in range(len(rows))],
            )
            left.bar(
                x, heights, 0.45, bottom=bottom, color=f"C{number}", label=None if place else part
            )
            bottom = [a + b for a, b in zip(bottom, heights, strict=True)]
    left.set_xticks(
        [5 * i + 0.25 * len(rows[0]["ms"]) for i in range(len(rows))],
        [f"TP {row['tp']}" for row in rows],
    )
    names = ", ".join(rows[0]["ms"]).replace(", sft", ",\nsft")
    left.set_title(f"a micro-batch of {' on '.join(result['first'])}; bars: {names}", fontsize=8)
    left.set_ylabel("ms")
    steps = [row for row in result["steps"] if row["layout"]]
    for number, model in enumerate(dict.fromkeys(row["model"] for row in steps)):
        of = [row for row in steps if row["model"] == model and row["gpu"] == result["first"][1]]
        for name, style in zip(list(steps[0]["against_plain"])[-2:], ("-o", ":s"), strict=False):
            points = [row["gpus"] for row in of], [100 * row["against_plain"][name] for row in of]
            right.plot(*points, style, color=f"C{number}", label=f"{model}, {name}")
    right.set_xscale("log", base=2)
    right.set_title("step against plain SFT; on paper, not measured", fontsize=8)
    right.set(xlabel="GPUs", ylabel="%")
    for axes in (left, right):
        axes.legend(fontsize=7)
        axes.grid(True, axis="y", alpha=0.3)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; see EXAMPLE. Raises UserError for an assumption that there is not."""
    parser = command.parser(__doc__, EXAMPLE)
    parser.add_argument(
        "--model", nargs="+", choices=MODELS, default=["llama3-8b"], help="default: llama3-8b"
    )
    parser.add_argument("--gpu", nargs="+", choices=GPUS, default=["h100"], help="default: h100")
    parser.add_argument(
        "--gpus", nargs="+", type=int, default=[8, 64, 512, 4096], metavar="N", help="8 64 512 4096"
    )
    for name in ("tp", "pp"):
        parser.add_argument(
            f"--{name}", type=int, metavar="N", help="default: the model's usual one"
        )
    parser.add_argument(
        "--cp", type=int, default=1, metavar="N", help="context parallel ranks (default: 1)"
    )
    parser.add_argument(
        "--tokens", type=int, default=8192, metavar="N", help="of a micro-batch (default: 8192)"
    )
    parser.add_argument(
        "--micro-batches", type=int, default=16, metavar="N", help="a rank and step (default: 16)"
    )
    ours = [name for name in LOSSES if name != PLAIN]
    parser.add_argument(
        "--losses", nargs="+", choices=ours, default=ours, metavar="L", help=", ".join(ours)
    )
    parser.add_argument(
        "--teacher",
        choices=MODELS,
        help="live teacher of target-sft-dense (default: the model itself)",
    )
    parser.add_argument("--fuse-head", action="store_true", help="the head is part of our losses")
    parser.add_argument(
        "--recompute", action="store_true", help="activations of all layers are computed again"
    )
    parser.add_argument(
        "--assume", nargs="+", default=[], metavar="NAME=X", help="other values than those printed"
    )
    parser.add_argument(
        "--output", metavar="DIR", help="write scaling_model.json, .md and .png there"
    )
    args = parser.parse_args(argv)
    args.command = command.command_line("benchmarks/model_scaling.py", argv)
    try:
        args.assumed = {
            name: float(value) for name, _, value in (text.partition("=") for text in args.assume)
        }
    except ValueError:
        raise UserError(f"--assume {' '.join(args.assume)}: write NAME=NUMBER") from None
    if unknown := [name for name in args.assumed if name not in ASSUMED]:
        raise UserError(f"--assume {unknown[0]}: valid: {', '.join(ASSUMED)}")
    return args


@command.says_errors
def main(argv: list[str] | None = None) -> int:
    """Print the tables; the exit status is 0, or 2 for a user's error."""
    args = parse(argv)
    folder = command.check_output(args.output) if args.output else None
    result = calculate(args)
    shown = "\n\n".join(["A model on paper: not measured.", *tables(result).values()])
    print(shown)
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "scaling_model.json", json.dumps(result, indent=1) + "\n")
        write_text(folder / "scaling_model.md", f"    {result['command']}\n\n{shown}\n")
        draw(result, folder / "scaling_model.png")
        names = (f"scaling_model.{ending}" for ending in ("json", "md", "png"))
        print(f"\n{command.wrote(folder, *names)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
