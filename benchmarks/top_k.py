#!/usr/bin/env python3
"""How large must k be? Loss and gradient of a student with a teacher cut to its top-k, against the
whole teacher.

For every k and both tails: the relative error of the mean loss, the relative error of the gradient
with respect to the logits (norm of the difference over norm), and the bytes that a token takes in a
cache. Student and teacher are Hugging Face folders, computed by transformers in fp32 on the CPU;
log-probs are rounded to fp16 as a cache does.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from megatron_tsft import objectives
from megatron_tsft.atomic import write_text
from megatron_tsft.data.prepared import PreparedData
from megatron_tsft.errors import UserError
from megatron_tsft.loss import TeacherRecords, TeacherTopK, q_target_cross_entropy
from megatron_tsft.objectives import Objective
from megatron_tsft.teacher.format import ENTRY_BYTES, TOKEN_BYTES
from megatron_tsft.teacher.job import as_rows
from megatron_tsft.teacher.topk import teacher_topk
from shared import command

EXAMPLE = """examples:
  benchmarks/top_k.py --student SmolLM2-135M --teacher SmolLM2-1.7B --data data/heldout \\
      --output study
  benchmarks/top_k.py --student a --teacher b --data data/heldout --output study \\
      --objective kd --k 16 256
"""
TAILS: tuple[Literal["uniform", "drop"], ...] = ("uniform", "drop")


@dataclass
class Sums:
    """Over tokens: of the loss, of the squared gradient, and of the squared difference to the dense
    gradient."""

    loss: float = 0.0
    square: float = 0.0
    difference: float = 0.0


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; see EXAMPLE."""
    parser = command.parser(__doc__, EXAMPLE)
    parser.add_argument("--student", required=True, metavar="DIR", help="Hugging Face folder")
    parser.add_argument(
        "--teacher", required=True, metavar="DIR", help="Hugging Face folder, the same tokenizer"
    )
    parser.add_argument(
        "--data", required=True, metavar="DIR", help="folder made by prepare_data.py"
    )
    parser.add_argument(
        "--output", required=True, metavar="DIR", help="for top_k.json and top_k.png"
    )
    parser.add_argument(
        "--k",
        type=int,
        nargs="+",
        default=[1, 8, 64, 512],
        metavar="K",
        help="(default: 1 8 64 512)",
    )
    parser.add_argument(
        "--objective",
        nargs="+",
        default=["target-sft,eta=0.5", "kd"],
        metavar="NAME[,k=v]",
        help="that read a teacher",
    )
    parser.add_argument(
        "--conversations", type=int, default=32, metavar="N", help="of the data (default: 32)"
    )
    parser.add_argument("--no-progress", action="store_true", help="no progress bar")
    return parser.parse_args(argv)


def load(folder: str) -> Any:
    """A model in fp32."""
    from transformers import AutoModelForCausalLM

    if not (Path(folder) / "config.json").is_file():
        raise UserError(f"{folder} has no config.json: name a Hugging Face folder")
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True
    ).eval()


def rounded(topk: TeacherRecords[Tensor], tail: Literal["uniform", "drop"]) -> TeacherTopK:
    """The records as a cache gives them back."""
    return TeacherTopK.of(as_rows(topk, [len(topk)])[0].map(torch.from_numpy), tail)


def loss_and_gradient(
    z: Tensor, y: Tensor, objective: Objective, teacher: Any
) -> tuple[float, Tensor]:
    """(summed loss, gradient [n, V]); raises UserError for an objective that needs more than a
    teacher."""
    z = z.detach().requires_grad_()
    try:
        loss = q_target_cross_entropy(z, y, objective, teacher=teacher).loss.sum()
    except (ValueError, TypeError) as error:
        raise UserError(f"--objective {objective.name}: {error}") from None
    (gradient,) = torch.autograd.grad(loss, z)
    return loss.item(), gradient


def tokens(
    data: PreparedData, count: int, models: tuple[Any, Any], progress: bool
) -> Iterator[tuple[Tensor, ...]]:
    """(student's logits, teacher's logits, labels) of the supervised tokens, a conversation at a
    time."""
    chosen = np.linspace(0, len(data) - 1, min(count, len(data))).astype(int)
    for row in tqdm(chosen.tolist(), desc="conversations", disable=not progress):
        sample = data.row(row)
        ids, wanted = (
            torch.from_numpy(sample.input_ids.astype(np.int64)),
            torch.tensor(sample.loss_mask[1:].tolist()),
        )
        with torch.no_grad():
            z, t = (model(input_ids=ids[None, :-1]).logits[0][wanted] for model in models)
        yield z, t, ids[1:][wanted]


def study(args: argparse.Namespace) -> dict:
    """Everything that was measured."""
    chosen: dict[str, Objective] = {}
    for text in args.objective:
        try:
            chosen[text] = objectives.parse(text)
        except (ValueError, TypeError) as error:
            raise UserError(f"--objective {text}: {error}") from None
    for text, objective in chosen.items():
        if not objective.reads_teacher:
            raise UserError(f"--objective {text} reads no teacher: its loss does not depend on k")
    data, models = PreparedData.load(args.data), (load(args.student), load(args.teacher))
    vocab_size = models[0].config.vocab_size
    if models[1].config.vocab_size != vocab_size:
        raise UserError(
            f"vocabularies of {vocab_size} and {models[1].config.vocab_size} tokens: they must be"
            " the same"
        )
    sums: dict[tuple, Sums] = {}
    count, tails = 0, dict.fromkeys(args.k, 0.0)
    for z, t, y in tokens(data, args.conversations, models, not args.no_progress):
        count += len(y)
        dense = {text: loss_and_gradient(z, y, objective, t) for text, objective in chosen.items()}
        for text, (loss, gradient) in dense.items():
            total = sums.setdefault((text, 0, "dense"), Sums())
            total.loss, total.square = (
                total.loss + loss,
                total.square + float(gradient.square().sum()),
            )
        for k in args.k:
            topk = teacher_topk(t, y, k, vocab_size=vocab_size)
            tails[k] += float(topk.tail_logmass.exp().sum())
            for tail in TAILS:
                for text, objective in chosen.items():
                    loss, gradient = loss_and_gradient(z, y, objective, rounded(topk, tail))
                    total = sums.setdefault((text, k, tail), Sums())
                    total.loss += loss
                    total.difference += float((gradient - dense[text][1]).square().sum())
    rows = []
    for (text, k, tail), total in sums.items():
        whole = sums[text, 0, "dense"]
        if k:
            rows.append(
                {
                    "objective": text,
                    "k": k,
                    "tail": tail,
                    "loss_error": abs(total.loss / whole.loss - 1),
                    "gradient_error": (total.difference / whole.square) ** 0.5,
                    "tail_mass": tails[k] / count,
                    "bytes_per_token": TOKEN_BYTES + ENTRY_BYTES * k,
                }
            )
    names = {"student": args.student, "teacher": args.teacher, "data": args.data}
    return {key: Path(value).resolve().name for key, value in names.items()} | {
        "tokens": count,
        "rows": rows,
    }


def table(result: dict) -> str:
    """As Markdown."""
    lines = [
        "| objective | k | bytes a token | mass left out | loss, uniform | loss, drop | gradient,"
        " uniform | gradient, drop |",
        "|---" * 8 + "|",
    ]
    found = {(row["objective"], row["k"], row["tail"]): row for row in result["rows"]}
    for text, k in sorted({(row["objective"], row["k"]) for row in result["rows"]}):
        uniform, drop = found[text, k, "uniform"], found[text, k, "drop"]
        values = [
            uniform["loss_error"],
            drop["loss_error"],
            uniform["gradient_error"],
            drop["gradient_error"],
        ]
        shown = " | ".join(f"{100 * value:.3g}%" for value in values)
        lines.append(
            f"| {text} | {k} | {uniform['bytes_per_token']} | {100 * uniform['tail_mass']:.3g}% |"
            f" {shown} |"
        )
    return "\n".join(lines)


def draw(result: dict, path: Path) -> None:
    """The errors over k."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), constrained_layout=True)
    texts = list(dict.fromkeys(row["objective"] for row in result["rows"]))
    for axis, key, title in zip(
        axes, ("loss_error", "gradient_error"), ("loss", "gradient"), strict=True
    ):
        for number, text in enumerate(texts):
            for tail, style in zip(TAILS, ("-", "--"), strict=True):
                rows = [
                    row for row in result["rows"] if (row["objective"], row["tail"]) == (text, tail)
                ]
                points = [row["k"] for row in rows], [row[key] for row in rows]
                axis.loglog(
                    *points, style, marker="o", color=f"C{number}", label=f"{text}, tail {tail}"
                )
        axis.set(xlabel="k", ylabel="relative error", title=f"{title} against the whole teacher")
        axis.grid(True, which="both", alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


@command.says_errors
def main(argv: list[str] | None = None) -> int:
    """Study; the exit status is 0, or 2 for a user's error."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    args = parse(argv)
    folder = command.check_output(args.output)
    result = study(args)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "top_k.json", json.dumps(result, indent=1) + "\n")
    draw(result, folder / "top_k.png")
    print(
        f"{result['tokens']} supervised tokens of {result['data']}, student {result['student']},"
        f" teacher {result['teacher']}: relative errors against the whole teacher\n\n"
        f"{table(result)}\n"
    )
    print(command.wrote(folder, "top_k.json", "top_k.png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
