"""The merge that the losses do not use gives the same statistics, so their times compare; the tool
prints both."""

import json
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from benchmarks import collectives
from megatron_tsft.loss.dispatch import implementation
from megatron_tsft.loss.statistics import Table, merge
from tests.fresh import REPOSITORY
from tests.ranks import run_ranks

TOOL = REPOSITORY / "benchmarks" / "collectives.py"


def both_ways(rank: int) -> None:
    group = dist.group.WORLD
    for name in collectives.OBJECTIVES:
        problem, logits = collectives.problem_of(name, 13, 7, group, torch.device("cpu"))
        shard = problem.shard(logits)
        local = implementation(logits).local_statistics(shard, problem.selection)
        other = collectives.max_and_sum(
            Table(local.names, local.data.clone()), float(shard.a), float(shard.b), group
        )
        ours = merge(local, shard.a, shard.b, group)
        # m_pi is only an origin: what counts is the sum it is for
        for table in (ours, other):
            if "m_pi" in table:
                factor = table["m_pi"].exp()
                for key in ("s_pi", "d_pi"):
                    table[key].mul_(factor)
                table["m_pi"].zero_()
        torch.testing.assert_close(other.data, ours.data, rtol=1e-5, atol=1e-5)


def test_both_ways_agree() -> None:
    run_ranks(2, both_ways)


@pytest.mark.slow
def test_the_tool_times_every_way() -> None:
    command = [
        sys.executable,
        str(TOOL),
        *"--tp 2 --tokens 64 --columns 64 --repeat 1 --json".split(),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert [row["objective"] for row in rows] == ["sft", "gem"]
    ways = {"one all-gather", "MAX and SUM", "statistics, whole", "statistics, halves"}
    assert all(ways <= row.keys() and min(row[way] for way in ways) > 0 for row in rows)


def test_too_few_ranks() -> None:
    done = subprocess.run([sys.executable, str(TOOL), "--tp", "1"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: --tp")
