#!/usr/bin/env python3
"""Time the ways to merge per-token statistics over tensor-parallel ranks: one all-gather, or MAX
and SUM all-reduces.

Also the whole forward pass of the loss's statistics in one piece and in two halves, the first
half's all-gather under the second half's work. The losses use the all-gather in one piece
(docs/performance.md says why).
"""

import argparse
import json
import os
import statistics as numbers
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from megatron_tsft import objectives
from megatron_tsft.errors import UserError
from megatron_tsft.loss.dispatch import implementation
from megatron_tsft.loss.problem import LossOptions, Problem, make_problem
from megatron_tsft.loss.statistics import Table, combine, merge
from shared import command

EXAMPLE = """example:
  benchmarks/collectives.py --tp 2 4 --tokens 512 2048 8192
  benchmarks/collectives.py --tp 8 --columns 18992        # on 8 GPUs, with NCCL
"""
OBJECTIVES = ("sft", "gem")


def max_and_sum(local: Table, a: float, b: float, group: Any) -> Table:
    """The alternative: the common maxima by MAX, every sum rescaled to them, the sums by SUM."""
    maxima = [name for name in ("m", "m_pi") if name in local]
    mine = local.data[: len(maxima)].clone()
    if "m_pi" in local:  # shards compare what their maxima stand for, not what they count from
        local["m_pi"].add_(a * local["m"])
    common = local.data[: len(maxima)]
    dist.all_reduce(common, dist.ReduceOp.MAX, group=group)
    if "m_pi" in local:
        local["m_pi"].sub_(a * local["m"])
    by = mine[0] - local["m"]
    local["s"].mul_(by.exp())
    if "m_pi" in local:
        factor = (mine[1] + a * by - local["m_pi"]).exp()
        local["d_pi"].add_(local["s_pi"] * by).mul_(factor)
        local["s_pi"].mul_(factor)
    dist.all_reduce(local.data[len(maxima) :], group=group)
    return local


def in_halves(problems: list[tuple[Problem, Tensor]], group: Any) -> list[Table]:
    """Statistics and all-gather of each half of the tokens; the second half's work runs under the
    first's transfer."""
    pending = []
    for problem, logits in problems:
        shard = problem.shard(logits)
        local = implementation(logits).local_statistics(shard, problem.selection)
        gathered = local.data.new_empty(dist.get_world_size(), *local.data.shape)
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        handle = gather(gathered.flatten(0, 1), local.data, group=group, async_op=True)
        pending.append((handle, local.names, gathered, shard))
    merged = []
    for handle, names, gathered, shard in pending:
        handle.wait()
        merged.append(combine(names, gathered, shard.a, shard.b))
    return merged


def problem_of(
    name: str, tokens: int, columns: int, group: Any, device: torch.device
) -> tuple[Problem, Tensor]:
    """A random problem of one rank's shard."""
    generator = torch.Generator(device).manual_seed(dist.get_rank())
    logits = torch.randn(tokens, columns, generator=generator, device=device, dtype=torch.bfloat16)
    labels = torch.arange(tokens, device=device) % columns
    options: LossOptions = {"tp_group": group}
    return make_problem(labels, objectives.get(name), None, options, logits, columns), logits


def times(call: Callable[[], Any], repeat: int, device: torch.device) -> float:
    """Median seconds of the slowest rank."""
    spent = []
    for i in range(repeat + 1):
        dist.barrier()
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        slowest = torch.tensor([time.perf_counter() - start], device=device)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        spent += [float(slowest)] if i else []
    return numbers.median(spent)


def rank_main(rank: int, world: int, store: str, args: argparse.Namespace, results: str) -> None:
    """Measure everything on one rank; rank 0 writes the rows."""
    torch.set_num_threads(1)
    device = torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=world)
    group, rows = dist.group.WORLD, []
    for name in OBJECTIVES:
        for tokens in args.tokens:
            problem, logits = problem_of(name, tokens, args.columns, group, device)
            shard = problem.shard(logits)
            local = implementation(logits).local_statistics(shard, problem.selection)
            halves = [problem_of(name, tokens // 2, args.columns, group, device) for _ in range(2)]

            def whole(problem: Problem = problem, logits: Tensor = logits) -> Table:
                shard = problem.shard(logits)
                return merge(
                    implementation(logits).local_statistics(shard, problem.selection),
                    shard.a,
                    shard.b,
                    group,
                )

            ways: dict[str, Callable[[], Any]] = {
                "one all-gather": lambda local=local, shard=shard: merge(
                    local, shard.a, shard.b, group
                ),
                # a copy, because it works in place
                "MAX and SUM": lambda local=local, shard=shard: max_and_sum(
                    Table(local.names, local.data.clone()), float(shard.a), float(shard.b), group
                ),
                "statistics, whole": whole,
                "statistics, halves": lambda halves=halves: in_halves(halves, group),
            }
            row = {"tp": world, "objective": name, "tokens": tokens, "columns": args.columns}
            row |= {way: times(call, args.repeat, device) for way, call in ways.items()}
            rows.append(row)
    if rank == 0:
        Path(results).write_text(json.dumps(rows))
    dist.destroy_process_group()


@command.says_errors
def main(argv: list[str] | None = None) -> int:
    """Print a table, or JSON."""
    parser = command.parser(__doc__, EXAMPLE)
    parser.add_argument("--tp", type=int, nargs="+", default=[2, 4], help="ranks (default: 2 4)")
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[512, 2048, 8192], help="default: 512 2048 8192"
    )
    parser.add_argument(
        "--columns", type=int, default=2048, help="of each rank's shard (default: 2048)"
    )
    parser.add_argument(
        "--repeat", type=int, default=15, help="timings of each, of which the median counts"
    )
    parser.add_argument("--json", action="store_true", help="print every row as JSON")
    args = parser.parse_args(argv)
    if min(args.tp) < 2 or min(args.tokens) < 2 or args.columns < 1 or args.repeat < 1:
        raise UserError(
            f"--tp {args.tp} --tokens {args.tokens} --columns {args.columns} --repeat"
            f" {args.repeat}: --tp and --tokens must be at least 2, --columns and --repeat 1"
        )
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    rows: list[dict[str, Any]] = []
    for world in args.tp:
        with tempfile.TemporaryDirectory() as scratch:
            results = os.path.join(scratch, "rows.json")
            job = (world, os.path.join(scratch, "store"), args, results)
            mp.spawn(rank_main, job, nprocs=world)  # type: ignore
            rows += json.loads(Path(results).read_text())
    if args.json:
        print(json.dumps(rows))
        return 0
    ways = [key for key in rows[0] if key not in ("tp", "objective", "tokens", "columns")]
    print("milliseconds, median, of the slowest rank")
    print(f"{'tp':>3} {'objective':9} {'tokens':>7}  " + "  ".join(f"{way:>18}" for way in ways))
    for row in rows:
        cells = "  ".join(f"{1e3 * row[way]:18.3f}" for way in ways)
        print(f"{row['tp']:3} {row['objective']:9} {row['tokens']:7}  {cells}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
