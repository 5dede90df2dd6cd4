#!/usr/bin/env python3
"""How the losses grow with vocabulary, tensor and context parallelism: CPU time measured, messages
counted.

CPU time of one thread, forward and backward, medians; what is compared runs in turn in the same
process: read the ratios. Messages are counted by wrapping torch.distributed and torch's operations
by a dispatch mode, around what training runs for a micro-batch: output hook, the loss's reduction,
backward. Writes scaling.json, .md and .png.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TRITON_INTERPRET", "1")  # for the counts; decided when a kernel is defined

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_tsft import objectives, q_target_cross_entropy
from megatron_tsft.atomic import write_text
from megatron_tsft.errors import UserError
from shared import command
from shared.inputs import CHOICES, Case, Section, Shape, make_case
from shared.machine import environment
from shared.peers import PEERS, Step, gradients, use_backend
from shared.report import markdown_table

EXAMPLE = """example:
  benchmarks/scaling.py --output docs/benchmark
"""
KEYS = ("sft", "target-sft-eta0", "gem", "target-sft-dense", "target-sft-topk")
PEERS_OVER_V = {
    **{key: (key, "ours-torch") for key in KEYS},
    "F.cross_entropy": ("sft", "F.cross_entropy"),
}
PEERS_OVER_V["megatron"] = ("sft", "megatron")
MOVERS = (
    "all_reduce",
    "all_gather_single",
    "all_gather_into_tensor",
    "reduce_scatter_single",
    "reduce_scatter_tensor",
)
VERSIONS = ("torch", "triton", "megatron-core")
SEQUENCES = 16  # of iw-sft's micro-batch


# ---- counting ------------------------------------------------------------------------------------


@contextmanager
def messages() -> Iterator[list[tuple[str, int]]]:
    """(collective, bytes of this rank's part) of every collective on tensors that is called
    meanwhile."""
    seen: list[tuple[str, int]] = []
    inside = False

    def counted(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **keywords: Any) -> Any:
            nonlocal inside
            if inside:  # one may be made of another
                return call(*args, **keywords)
            part: torch.Tensor = args[0 if name == "all_reduce" else 1]
            seen.append(
                (
                    name.removesuffix("_single").removesuffix("_into_tensor"),
                    part.numel() * part.element_size(),
                )
            )
            inside = True
            try:
                return call(*args, **keywords)
            finally:
                inside = False

        return wrapped

    there: dict[str, Any] = {
        name: counted(name, getattr(dist, name)) for name in MOVERS if hasattr(dist, name)
    }
    with patch.multiple(dist, **there):
        yield seen


class Operations(TorchDispatchMode):
    """Counts what a GPU would launch: every torch operation that is no view, no allocation and no
    collective."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        name = str(func)
        if not (
            func.is_view
            or name.startswith(
                ("aten.empty", "aten.new_empty", "aten.detach", "aten.lift", "c10d.")
            )
        ):
            self.count += 1
        return func(*args, **(kwargs or {}))


class Launch:
    """Stands for a Triton kernel: one launch, nothing computed."""

    def __init__(self, operations: Operations):
        self.operations = operations

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(**arguments: Any) -> None:
            self.operations.count += 1

        return launch


def training_loss(case: Case) -> list[str]:
    """What training does with a micro-batch's logits: the output hook, the loss's reduction,
    backward. What it logs."""
    from megatron_tsft.cpu import install

    install()  # before Megatron is imported
    from megatron_tsft.data.batch import MicroBatch
    from megatron_tsft.loss.records import TeacherRecords
    from megatron_tsft.model.loss_reduction import reduce_loss
    from megatron_tsft.model.output_hook import LossContext, q_target_output

    leaf, labels, kind = case.leaves[0], case.labels[None], CHOICES[case.key].teacher
    zeros, topk = torch.zeros_like(labels), None
    if kind == "topk" and case.topk is not None:  # as a cache's records come
        topk = TeacherRecords(
            case.topk.ids[None], case.topk.logprobs[None], zeros - 2.0, zeros - 3.0
        )
    batch = MicroBatch(labels, labels, zeros, None, zeros, [labels.shape[1]], [0], teacher=topk)
    vocabulary = leaf.shape[1] * (1 if case.group is None else case.group.size())
    context = LossContext(CHOICES[case.key].objective(), batch, vocabulary, True, case.group, None)
    context.teacher = case.dense[:, None] if kind == "dense" and case.dense is not None else None
    output = q_target_output(
        hidden_states=leaf[:, None] * 1,  # stands for the head
        output_layer=lambda hidden, weight: (hidden, None),
        output_weight=None,
        labels=labels,
        context=context,
        scale_logits=lambda logits: logits,
    )
    loss, _, logged = reduce_loss(context, 1.0, output)
    torch.autograd.grad(loss, leaf)
    return list(logged)


def counts(key: str, case: Case) -> dict[str, Any]:
    """Messages, operations and logged values of one micro-batch; `key`: one of CHOICES, or
    "megatron" (its loss alone).

    Two operations stand for the head and are not counted; a few of ours work on a number of the
    host.
    """
    from megatron_tsft.loss.triton import launch

    operations, logged = Operations(), ["lm loss"]
    fakes: dict[str, Any] = {
        "forward_kernel": Launch(operations),
        "backward_kernel": Launch(operations),
    }
    use_backend("triton")
    with messages() as sent, patch.multiple(launch, **fakes), operations:
        if key == "megatron":
            PEERS[key].build(replace(case, key="sft"))()
        else:
            logged = training_loss(replace(case, key=key))
            operations.count -= 2
    use_backend(None)
    return {"loss": key, "messages": sent, "operations": operations.count, "logged": len(logged)}


# ---- measuring -----------------------------------------------------------------------------------


def in_turn(steps: dict[str, Step], repeat: int) -> dict[str, float]:
    """Median CPU milliseconds of each step, all of them in each round; each runs once before, so
    none pays for the memory that another has given back."""
    spent: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeat):
        for name, step in steps.items():
            step()
            if dist.is_initialized():
                dist.barrier()
            start = time.process_time()
            found = step()
            spent[name].append(1e3 * (time.process_time() - start))
            del found
    return {name: statistics.median(times) for name, times in spent.items()}


def section(tokens: int, vocabulary: int, ranks: int = 1) -> Section:
    return Section(Shape(tokens, vocabulary, ranks), "bf16", "logits", 0, ranks, 0, "cpu", KEYS)


def over_vocabulary(tokens: int, columns: int, repeat: int) -> dict[str, Any]:
    """One row of the first table."""
    case = make_case(section(tokens, columns))
    steps = {n: PEERS[p].build(replace(case, key=k)) for n, (k, p) in PEERS_OVER_V.items()}
    return {"tokens": tokens, "columns": columns, "cpu_ms": in_turn(steps, repeat)}


def sequence_step(case: Case, cp_group: Any) -> Step:
    """iw-sft, whose means run over whole sequences, so over the context-parallel ranks."""
    n, objective = len(case.labels), objectives.get("iw-sft")
    ids, reference = torch.arange(n) * SEQUENCES // n, torch.full((n,), -2.0)

    def step() -> tuple[torch.Tensor, ...]:
        use_backend("torch")
        keywords: dict[str, Any] = {
            "reference_logprobs": reference,
            "sequence_ids": ids,
            "num_sequences": SEQUENCES,
        }
        out = q_target_cross_entropy(
            case.leaves[0], case.labels, objective, cp_group=cp_group, **keywords
        )
        return gradients(out.loss, case)

    return step


def rank_main(rank: int, world: int, store: str, args: argparse.Namespace, results: str) -> None:
    """Everything that is measured and counted with `world` ranks; rank 0 writes it."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    group = dist.group.WORLD if world > 1 else None
    whole, shard = (
        make_case(section(args.tokens, args.columns, n), rank if n > 1 else 0) for n in (1, world)
    )
    part = make_case(section(args.tokens // world, args.columns))
    ours, steps = PEERS["ours-torch"].build, {}
    for key in KEYS:
        steps[f"whole {key}"] = ours(replace(whole, key=key))
        steps[f"TP {key}"] = ours(replace(shard, key=key, group=group))
        steps[f"CP {key}"] = ours(replace(part, key=key))
    steps["whole iw-sft"], steps["CP iw-sft"] = (
        sequence_step(whole, None),
        sequence_step(part, group),
    )
    steps["TP megatron"] = PEERS["megatron"].build(
        replace(shard, key="sft", group=dist.group.WORLD)
    )
    mine = in_turn(steps, args.repeat)
    every: list[Any] = [None] * world
    dist.all_gather_object(every, mine)
    found: list[dict[str, Any]] = []
    for key in (*KEYS, "megatron"):
        small = section(64, 1024 * world, world)
        found.append(counts(key, replace(make_case(small, rank), group=group)) | {"tokens": 64})
    with messages() as sent:
        steps["CP iw-sft"]()
    found.append({"loss": "iw-sft over CP", "messages": sent, "tokens": len(part.labels)})
    if rank == 0:
        medians = {name: statistics.mean(row[name] for row in every) for name in mine}
        Path(results).write_text(json.dumps({"ranks": world, "cpu_ms": medians, "counts": found}))
    dist.barrier()
    dist.destroy_process_group()


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """The whole run."""
    result: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="minutes"),
        "command": args.command,
        "environment": environment("cpu", 1, VERSIONS),
        "over_ranks": [],
    }
    for world in args.ranks:
        with tempfile.TemporaryDirectory() as scratch:
            results = os.path.join(scratch, "rows.json")
            job = (world, os.path.join(scratch, "store"), args, results)
            mp.spawn(rank_main, job, nprocs=world)  # type: ignore
            result["over_ranks"].append(json.loads(Path(results).read_text()))
    result["over_vocabulary"] = [
        over_vocabulary(args.vocabulary_tokens, v, args.repeat) for v in args.vocabulary
    ]
    return result


def vocabulary_table(result: dict[str, Any]) -> str:
    """A line a width: times over the vocabulary."""
    names = (*KEYS, "megatron")
    head = ["columns", "F.cross_entropy, ms", "ours (sft), ns a logit"]
    head += [f"{name} / F.ce" for name in names]
    rows = []
    for row in result["over_vocabulary"]:
        ms = row["cpu_ms"]
        per_logit = f"{1e6 * ms['sft'] / row['tokens'] / row['columns']:.2f}"
        ratios = [f"{ms[name] / ms['F.cross_entropy']:.2f}" for name in names]
        rows.append([str(row["columns"]), f"{ms['F.cross_entropy']:.1f}", per_logit, *ratios])
    return markdown_table(head, rows)


def ranks_table(result: dict[str, Any]) -> str:
    """A line a loss and number of ranks: times of one rank, alone and of one rank's."""
    head = ["ranks", "loss"]
    for kind in ("TP", "CP"):
        head += [f"{kind}: ms a rank", f"{kind}: of one rank's"]
    rows = []
    for run in result["over_ranks"]:
        for name in (*KEYS, "iw-sft", "megatron"):
            tp, cp, whole = (run["cpu_ms"].get(f"{kind} {name}") for kind in ("TP", "CP", "whole"))
            cells = []
            for x in (tp, cp):
                cells += [f"{x:.1f}" if x else "-", f"{x / whole:.2f}" if x and whole else "-"]
            rows.append([str(run["ranks"]), name, *cells])
    return markdown_table(head, rows)


def counts_table(result: dict[str, Any]) -> str:
    """A line for what is sent and launched alike, with the numbers of ranks that do so."""
    head = ["ranks", "loss", "messages", "bytes of one rank, a token"]
    head += ["torch operations", "values logged"]
    same: dict[tuple[str, ...], list[str]] = {}
    for run in result["over_ranks"]:
        for row in run["counts"] if run["ranks"] > 1 else ():
            sent = [name for name, _ in row["messages"]]
            size = sum(size for _, size in row["messages"])
            whole = "over CP" in row["loss"]
            cells = (
                row["loss"],
                ", ".join(f"{sent.count(name)} {name}" for name in dict.fromkeys(sent)),
                f"{size} a micro-batch" if whole else f"{size / row['tokens']:g}",
                str(row.get("operations", "-")),
                str(row.get("logged", "-")),
            )
            same.setdefault(cells, []).append(str(run["ranks"]))
    return markdown_table(head, [[", ".join(ranks), *cells] for cells, ranks in same.items()])


def tables(result: dict[str, Any]) -> dict[str, str]:
    """By title, in Markdown."""
    return {
        "vocabulary": vocabulary_table(result),
        "ranks": ranks_table(result),
        "counts": counts_table(result),
    }


def draw(result: dict[str, Any], path: Path) -> None:
    """Time over columns, as ratios, and over ranks."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    rows = result["over_vocabulary"]
    for name in PEERS_OVER_V:
        times = [1e6 * row["cpu_ms"][name] / row["tokens"] / row["columns"] for row in rows]
        left.semilogx(
            [row["columns"] for row in rows],
            times,
            "-o" if name in KEYS else "--s",
            base=2,
            label=name,
        )
    left.set(
        xlabel="columns",
        ylabel="CPU ns a logit",
        title="time a logit over the vocabulary",
        ylim=(0, None),
    )
    left.legend(fontsize=7, ncols=2, loc="lower left")
    runs = result["over_ranks"]
    ranks = [run["ranks"] for run in runs]
    for number, name in enumerate(KEYS):
        for kind, style in (("TP", "-o"), ("CP", ":s")):
            of_whole = [
                run["cpu_ms"][f"{kind} {name}"] / run["cpu_ms"][f"whole {name}"] for run in runs
            ]
            right.loglog(
                ranks, of_whole, style, base=2, color=f"C{number}", label=f"{name}, {kind}"
            )
    right.loglog(ranks, [1 / n for n in ranks], "k-", base=2, linewidth=0.8, label="1 / ranks")
    right.set(
        xlabel="ranks", ylabel="CPU time of a rank / of one rank alone", title="time over TP and CP"
    )
    right.legend(fontsize=7, ncols=2)
    for axes in (left, right):
        axes.grid(True, which="both", alpha=0.3)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


@command.says_errors
def main(argv: list[str] | None = None) -> int:
    """Measure, write the three files and print the tables."""
    parser = command.parser(__doc__, EXAMPLE)
    many: dict[str, Any] = {"type": int, "nargs": "+", "metavar": "N"}
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for the three files")
    parser.add_argument(
        "--vocabulary",
        **many,
        default=[2**n for n in range(13, 19)],
        help="default: 8192 to 262144",
    )
    parser.add_argument(
        "--vocabulary-tokens", type=int, default=512, metavar="N", help="default: %(default)s"
    )
    parser.add_argument("--ranks", **many, default=[1, 2, 4], help="default: 1 2 4")
    parser.add_argument(
        "--tokens", type=int, default=512, metavar="N", help="over the ranks (default: %(default)s)"
    )
    parser.add_argument(
        "--columns", type=int, default=131072, metavar="N", help="the same (default: %(default)s)"
    )
    parser.add_argument(
        "--repeat", type=int, default=5, metavar="N", help="timed rounds (default: %(default)s)"
    )
    args = parser.parse_args(argv)
    args.command = command.command_line("benchmarks/scaling.py", argv)
    if (
        min(args.vocabulary) < 64
        or any(r < 1 or args.tokens % r or args.columns % r for r in args.ranks)
        or args.repeat < 1
    ):
        raise UserError(
            f"--vocabulary {args.vocabulary}, --ranks {args.ranks}, --repeat {args.repeat}: a"
            f" vocabulary is at least 64, ranks divide --tokens {args.tokens} and --columns"
            f" {args.columns}, a repeat is at least 1"
        )
    torch.set_num_threads(1)
    folder = command.check_output(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    result = measure(args)
    shown = tables(result)
    write_text(folder / "scaling.json", json.dumps(result, indent=1) + "\n")
    write_text(
        folder / "scaling.md",
        "\n\n".join([f"{result['date']}\n\n    {result['command']}", *shown.values()]) + "\n",
    )
    draw(result, folder / "scaling.png")
    names = (f"scaling.{ending}" for ending in ("json", "md", "png"))
    print(*shown.values(), command.wrote(folder, *names), sep="\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
