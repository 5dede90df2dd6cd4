"""tools/benchmark_scaling.py: every message is counted once, its page shows its committed run. No
time is judged."""

import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.distributed as dist

from megatron_tsft.loss.collectives import all_gather, reduce_scatter
from tests.fresh import REPOSITORY
from tests.ranks import run_ranks

TOOL = REPOSITORY / "tools/benchmark_scaling.py"


@pytest.fixture
def tool() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(TOOL.parent))
        yield importlib.import_module("benchmark_scaling")


def send(rank: int, tool: ModuleType) -> list[tuple[str, int]]:
    group = dist.group.WORLD
    assert group is not None
    with tool.messages() as seen:
        assert all_gather(torch.ones(3, 5), group).shape == (2, 3, 5)
        reduce_scatter(torch.ones(4), group)
        total = torch.ones(2, dtype=torch.float64)
        dist.all_reduce(total, group=group)
    assert total.tolist() == [2, 2]
    dist.all_reduce(total, group=group)  # after it, nothing is counted
    return seen


def test_every_message_is_counted_once(tool: ModuleType) -> None:
    assert (
        run_ranks(2, send, tool)
        == [[("all_gather", 60), ("reduce_scatter", 16), ("all_reduce", 16)]] * 2
    )


def test_operations_leave_out_views_and_allocations(tool: ModuleType) -> None:
    with tool.Operations() as operations:
        x = torch.ones(2, 3)  # one
        x.T[0].view(-1)
        torch.empty(4)
        _ = x.sum() + 1  # two
    assert operations.count == 3


def test_the_page_shows_the_committed_run(tool: ModuleType) -> None:
    result = json.loads((REPOSITORY / "docs/benchmark/scaling.json").read_text())
    page = (REPOSITORY / "docs/scaling.md").read_text()
    for table in tool.tables(result).values():
        assert table in page
    assert result["command"] in page and result["date"][:10] in page


@pytest.mark.slow
def test_a_run(tool: ModuleType, tmp_path: Path) -> None:
    words = (
        "--vocabulary 256 512 --vocabulary-tokens 8 --ranks 1 2 --tokens 16 --columns 512"
        " --repeat 1"
    )
    command = [sys.executable, str(TOOL), "--output", str(tmp_path / "out"), *words.split()]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        f"scaling.{e}" for e in ("json", "md", "png")
    ]
    text = (tmp_path / "out/scaling.json").read_text()
    result = json.loads(text)
    assert str(tmp_path) not in text
    assert [row["columns"] for row in result["over_vocabulary"]] == [256, 512]
    for row in (*result["over_vocabulary"], *result["over_ranks"]):
        assert min(row["cpu_ms"].values()) > 0
    one, two = result["over_ranks"]
    assert all(not row["messages"] or row["loss"] == "megatron" for row in one["counts"])
    assert {row["loss"]: len(row["messages"]) for row in two["counts"]} == {
        **dict.fromkeys((*tool.KEYS, "iw-sft over CP"), 1),
        "megatron": 3,
    }
    assert all(table in done.stdout for table in tool.tables(result).values())


def test_ranks_that_do_not_divide(tool: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert tool.main("--output out --ranks 3".split()) == 2
    assert capsys.readouterr().err.startswith("error: ")
