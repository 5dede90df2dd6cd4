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

from benchmarks.paper import ASSUMED, GPUS, LOSSES, MODELS, PLAIN, Run
from benchmarks.report import markdown_table

from megatron_tsft.atomic import write_text
from megatron_tsft.errors import UserError

EXAMPLE = """examples:
  tools/model_scaling.py --model llama3-8b --gpu h100 --gpus 8 64 512 4096
  tools/model_scaling.py --model llama3-70b --tp 8 --pp 4 --micro-batches 32 \\
      --teacher qwen3-32b --fuse-head
  tools/model_scaling.py --assume mfu=0.55 operation_us=6
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


def calculate(args: argparse.Namespace) -> dict[str, Any]:
    """Every number of the tables, milliseconds."""
    first = args.model[0], args.gpu[0]
    parts, steps, growth = [], [], []
    for model, gpu in ((m, g) for m in args.model for g in args.gpu):
        for gpus in args.gpus:
            run = plan(args, model, gpu, gpus)
            if run.dp < 1 or run.gpus % (run.tp * run.pp * run.cp):
                steps.append({"model": model, "gpu": gpu, "gpus": gpus, "layout": None})
                continue
            plain = run.step(LOSSES[PLAIN])
            row = {
                "model": model,
                "gpu": gpu,
                "gpus": gpus,
                "layout": [run.tp, run.pp, run.cp, run.dp],
            }
            row |= {"plain_ms": 1e3 * plain, "gradients_ms": [1e3 * t for t in run.gradients()]}
            row |= {"logging_ms": 1e3 * (run.logging(LOSSES["sft"]) - run.logging(LOSSES[PLAIN]))}
            row["against_plain"] = {
                name: run.step(LOSSES[name]) / plain - 1 for name in args.losses
            }
            row["state_gb"] = {name: run.state_gb(LOSSES[name]) for name in (PLAIN, *args.losses)}
            row["too_large"] = [
                name for name, size in row["state_gb"].items() if size > run.gpu.hbm_gb
            ]
            steps.append(row)
        run = plan(args, model, gpu, max(args.gpus))
        if run.dp < 1:
            continue
        for name in (PLAIN, *args.losses):
            loss = LOSSES[name]
            found = {key: 1e3 * t for key, t in run.loss(loss).items()}
            share = run.micro_batches * sum(found.values()) / 1e3 / run.step(loss)
            live = 1e3 * sum(run.teacher_parts(loss).values())
            row = {
                "model": model,
                "gpu": gpu,
                "loss": name,
                "layout": [run.tp, run.pp, run.cp],
                "ms": found,
            }
            parts.append(
                row
                | {
                    "teacher_ms": live,
                    "share": share,
                    "stage_message": run.width(loss) / run.model.hidden,
                }
            )
    if not parts:
        raise UserError(
            f"--gpus {' '.join(map(str, args.gpus))}: too few for TP x PP x CP of these models"
        )
    for tp, cp in [(n, args.cp) for n in (1, 2, 4, 8)] + [
        (args.tp or MODELS[first[0]].tp, n) for n in (2, 4, 8, 16)
    ]:
        run = plan(args, *first, max(args.gpus), tp=tp, cp=cp)
        row = {
            "tp": tp,
            "cp": cp,
            "columns": run.columns,
            "tokens": run.n,
            "iw_sft_ms": 1e3 * run.over_context(),
        }
        row["ms"] = {
            name: {k: 1e3 * t for k, t in run.loss(LOSSES[name]).items()}
            for name in (PLAIN, *args.losses)
        }
        growth.append(row)
    assumed = {
        name: [args.assumed.get(name, value), source] for name, (value, source) in ASSUMED.items()
    }
    return {
        "command": args.command,
        "first": first,
        "assumed": assumed,
        "parts": parts,
        "steps": steps,
        "growth": growth,
    }


def tables(result: dict[str, Any]) -> dict[str, str]:
    """By title, in Markdown."""

    def percent(x: float | None, sign: str = "") -> str:
        return "-" if x is None else f"{100 * x:{sign}.2f}%"

    rows = [[name, f"{value:g}", source] for name, (value, source) in result["assumed"].items()]
    rows += [[name, *(f"{x:g}" for x in vars(gpu).values())] for name, gpu in GPUS.items()]
    found = {"assumptions": markdown_table(["assumption", "value", "source"], rows[: -len(GPUS)])}
    head = [
        "GPU, data sheet",
        "bf16 TFLOP/s, dense",
        "HBM TB/s",
        "HBM GB",
        "NVLink GB/s, a direction",
    ]
    found["gpus"] = markdown_table(head, rows[-len(GPUS) :])
    names = list(result["parts"][-1]["ms"])
    head = [
        "model, GPU, TP x PP x CP",
        "loss",
        *names,
        "sum, ms",
        "of the step",
        "teacher, ms",
        "stage messages",
    ]
    rows = []
    for row in result["parts"]:
        where = f"{row['model']}, {row['gpu']}, {' x '.join(map(str, row['layout']))}"
        ms = [f"{row['ms'][name]:.3f}" if name in row["ms"] else "-" for name in names]
        last = [
            f"{row['teacher_ms']:.1f}" if row["teacher_ms"] else "-",
            f"x {row['stage_message']:g}",
        ]
        rows.append(
            [
                where,
                row["loss"],
                *ms,
                f"{sum(row['ms'].values()):.3f}",
                percent(row["share"]),
                *last,
            ]
        )
    found["parts"] = markdown_table(head, rows)
    losses = next((list(row["against_plain"]) for row in result["steps"] if row["layout"]), [])
    head = [
        "model, GPU",
        "GPUs",
        "TP x PP x CP x DP",
        "plain step, ms",
        "logging more, ms",
        *losses,
        "GB a GPU, plain / most",
    ]
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
    found["steps"] = markdown_table(head, rows)
    head = ["TP", "CP", "columns", "tokens", *result["growth"][0]["ms"], "iw-sft's message over CP"]
    rows = []
    for row in result["growth"]:
        sums = [f"{sum(parts.values()):.3f}" for parts in row["ms"].values()]
        rows.append(
            [
                *(str(row[k]) for k in ("tp", "cp", "columns", "tokens")),
                *sums,
                f"{row['iw_sft_ms']:.3f}",
            ]
        )
    return found | {"growth": markdown_table(head, rows)}


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


def command_line(tool: str, words: list[str]) -> str:
    """As it was given; of the output folder only the name, so that no path of this machine is
    published."""
    return " ".join(
        [
            tool,
            *(Path(w).name if i and words[i - 1] == "--output" else w for i, w in enumerate(words)),
        ]
    )


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; see EXAMPLE. Raises UserError for an assumption that there is not."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLE, formatter_class=raw)
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
    args.command = command_line("tools/model_scaling.py", sys.argv[1:] if argv is None else argv)
    try:
        args.assumed = {
            name: float(value) for name, _, value in (text.partition("=") for text in args.assume)
        }
    except ValueError:
        raise UserError(f"--assume {' '.join(args.assume)}: write NAME=NUMBER") from None
    if unknown := [name for name in args.assumed if name not in ASSUMED]:
        raise UserError(f"--assume {unknown[0]}: valid: {', '.join(ASSUMED)}")
    return args


def main(argv: list[str] | None = None) -> int:
    """Print the tables; the exit status is 0, or 2 for a user's error."""
    try:
        args = parse(argv)
        result = calculate(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    shown = "\n\n".join(["A model on paper: not measured.", *tables(result).values()])
    print(shown)
    if args.output:
        folder = Path(args.output)
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "scaling_model.json", json.dumps(result, indent=1) + "\n")
        write_text(folder / "scaling_model.md", f"    {result['command']}\n\n{shown}\n")
        draw(result, folder / "scaling_model.png")
        print(f"\nwrote {folder}/scaling_model.json, .md and .png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
