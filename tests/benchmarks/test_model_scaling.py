"""The model on paper multiplies what is true: its counts are those of the code, its formulas those
of a ring."""

import importlib
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from shared import paper
from tests.fresh import REPOSITORY, fresh
from tests.ranks import run_ranks

KEYS = ("sft", "target-sft-eta0", "gem", "target-sft-dense", "target-sft-topk")
COMMITTED = REPOSITORY / "docs/benchmark/scaling_model.json"


@pytest.fixture(scope="module")
def model() -> ModuleType:
    """benchmarks/model_scaling.py."""
    return importlib.import_module("benchmarks.model_scaling")


def plan(model: ModuleType, words: str = "", gpus: int = 64, **changes: Any) -> Any:
    args = model.parse(words.split())
    return model.plan(args, args.model[0], args.gpu[0], gpus, **changes)


def benchmark() -> ModuleType:
    """Imported late: it switches Triton's interpreter on."""
    return importlib.import_module("benchmarks.scaling")


def count(rank: int) -> list[dict[str, Any]]:
    bench = benchmark()
    small, group = bench.section(64, 2048, 2), dist.group.WORLD
    return [
        bench.counts(key, replace(bench.make_case(small, rank), group=group))
        for key in (*KEYS, "megatron")
    ]


def counted() -> list[list[dict[str, Any]]]:
    """On two ranks; in an interpreter of its own, because the CPU layer comes before Megatron."""
    return run_ranks(2, count)


def test_messages_operations_and_logged_values_are_those_of_two_ranks(model: ModuleType) -> None:
    for found in fresh(counted):
        for row in found:
            loss = model.LOSSES[row["loss"]]
            assert tuple((kind, size / 64) for kind, size in row["messages"]) == loss.messages, row
            by_hand = paper.MEGATRON_REDUCTION if row["loss"] == "megatron" else 0
            # may take a few more or less
            others = 0 if torch.__version__.startswith("2.14.") else 0.1
            assert row["operations"] + by_hand == pytest.approx(loss.operations, rel=others), row
            assert row["logged"] == loss.logged, row


@pytest.mark.parametrize("columns", [4096, 16032])
def test_bytes_are_those_of_the_kernels(model: ModuleType, columns: int) -> None:
    command = [
        sys.executable,
        str(REPOSITORY / "benchmarks/count_traffic.py"),
        "--json",
        "--columns",
        str(columns),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    counted = json.loads(done.stdout)
    for key in KEYS:
        assert model.LOSSES[key].bytes(columns) / columns == pytest.approx(
            counted[key], abs=1e-4
        ), key


class WholeTensors(TorchDispatchMode):
    """Bytes of the tensors with a row for each token and all columns that operations read and
    write."""

    def __init__(self, elements: int):
        super().__init__()
        self.elements, self.bytes = elements, 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        if not func.is_view and "index" not in str(func):  # an index touches a column of each row
            # `out` is written only, a tensor that is written over is read and written
            for value in (*args, *(found if isinstance(found, tuple) else (found,))):
                if isinstance(value, torch.Tensor) and value.numel() >= self.elements:
                    self.bytes += value.numel() * value.element_size()
        return found


def move(rank: int) -> float:
    bench = benchmark()
    case = replace(bench.make_case(bench.section(16, 4096)), key="sft", group=dist.group.WORLD)
    step = bench.PEERS["megatron"].build(case)
    with WholeTensors(16 * 4096) as seen:
        step()
    return seen.bytes / (16 * 4096)


def moved() -> list[float]:
    return run_ranks(1, move)


def test_plain_cross_entropy_moves_52_bytes_a_logit(model: ModuleType) -> None:
    assert fresh(moved) == [model.LOSSES["megatron"].logit_bytes]


def test_the_fused_head_has_the_code_s_chunks(model: ModuleType) -> None:
    from megatron_tsft.loss import linear_head

    names = ("CHUNKS", "MIN_COLUMNS", "ALIGNMENT")
    assert [getattr(paper, name) for name in names] == [
        getattr(linear_head, name) for name in names
    ]
    plain, fused = (plan(model, words, tp=8) for words in ("", "--fuse-head"))
    loss = model.LOSSES["sft"]
    assert fused.loss(loss)["hbm"] == plain.loss(loss)["hbm"]
    chunks = 42  # 16032 columns, 384 at a time
    more = 1e6 * (fused.loss(loss)["operations"] - plain.loss(loss)["operations"])
    assert more == pytest.approx(chunks * paper.CHUNK_OPERATIONS * 3)
    assert fused.loss(model.LOSSES["megatron"]) == plain.loss(model.LOSSES["megatron"])


@pytest.mark.parametrize(
    ("name", "billions", "active"),
    [
        ("llama3-8b", 8.03, 8.03),
        ("llama3-70b", 70.6, 70.6),
        ("qwen3-32b", 32.8, 32.8),
        ("qwen3-235b-a22b", 235, 22),
    ],
)
def test_models_have_their_published_sizes(
    model: ModuleType, name: str, billions: float, active: float
) -> None:
    of = model.MODELS[name]
    assert of.parameters / 1e9 == pytest.approx(billions, rel=0.005)
    assert (of.active_in_layers + 2 * of.head) / 1e9 == pytest.approx(active, rel=0.01)


def test_messages_are_rings(model: ModuleType) -> None:
    run = plan(model)
    nvlink, network = 450e9 * 0.75, 50e9 * 0.75
    assert run.message("all_gather", 1e9, 1, 1) == 0
    assert run.message("all_gather", 1e9, 8, 8) == pytest.approx(15e-6 + 7e9 / nvlink)
    assert run.message("all_reduce", 1e9, 4, 8) == pytest.approx(15e-6 + 1.5e9 / nvlink)
    assert run.message("all_reduce", 8, 64, 64) == pytest.approx(
        (25 + 5 * 2 * 3) * 1e-6 + 8 * 2 * 63 / 64 / network
    )
    assert run.message("send", 1e9, 2, 64) == pytest.approx(25e-6 + 1e9 / network)


def test_the_cost_grows_as_it_must(model: ModuleType) -> None:
    losses = model.LOSSES
    over_tp = [plan(model, tp=tp).loss(losses["sft"]) for tp in (1, 2, 4, 8)]
    for one, two in zip(over_tp, over_tp[1:], strict=False):
        assert (
            two["hbm"] == pytest.approx(one["hbm"] / 2, rel=1e-2)
            and two["messages"] > one["messages"]
        )
        assert two["operations"] == one["operations"]
    for key in KEYS:
        wide, narrow = (
            plan(model, "--model qwen3-32b").loss(losses[key]),
            plan(model, tp=8).loss(losses[key]),
        )
        assert wide["hbm"] > narrow["hbm"]  # 151936 columns against 128256
        steps = [plan(model, gpus=n).step(losses[key]) for n in (8, 64, 512, 4096)]
        assert steps == sorted(steps)
        assert plan(model, "--recompute").step(losses[key]) > steps[1]
    half = plan(model, cp=2).loss(losses["sft"])
    assert half["hbm"] == pytest.approx(over_tp[1]["hbm"] / 2)
    assert (
        plan(model).over_context()
        == 0
        < plan(model, cp=2).over_context()
        < plan(model, cp=8).over_context()
    )


def test_a_live_teacher_costs_its_forward_pass_and_wider_messages(model: ModuleType) -> None:
    dense, plain = model.LOSSES["target-sft-dense"], model.LOSSES["megatron"]
    run = plan(model)
    of = run.model
    parts = run.teacher_parts(dense)
    assert sum(parts.values()) == pytest.approx(run.product(of.active_in_layers + of.head))
    assert run.teacher_parts(plain) == {"layers": 0, "head": 0}
    assert (
        0.28 < run.step(dense) / run.step(plain) - 1 < 1 / 3
    )  # forward alone of forward and twice backward
    other = plan(model, "--pp 2 --teacher llama3-70b")
    assert other.width(dense) == 4096 + 8192 and other.width(plain) == 4096
    parts = other.teacher_parts(dense)
    alike = replace(dense, live_teacher=False)
    messages = 2 * (
        other.message("send", 24, 2, 64) + 100e-6 + 2 * other.n * 8192 / 2 / (50e9 * 0.75)
    )  # of a stage
    stages = 1 + other.micro_batches  # the first once, the last for each micro-batch
    expected = stages * (parts["layers"] + messages) + other.micro_batches * parts["head"]
    assert other.step(dense) - other.step(alike) == pytest.approx(expected)
    assert other.state_gb(dense) - other.state_gb(plain) == pytest.approx(
        2 * 70.6 / (2 * 2), rel=0.005
    )


def test_the_page_shows_what_the_tool_calculates(model: ModuleType) -> None:
    committed = json.loads(COMMITTED.read_text())
    again = model.calculate(model.parse(committed["command"].split()[1:]))
    shown = model.tables(committed)
    assert model.tables(json.loads(json.dumps(again))) == shown
    page = (REPOSITORY / "docs/scaling.md").read_text()
    assert all(table in page for table in shown.values())
    # the script has moved since
    assert f"benchmarks/model_scaling.py {committed['command'].partition(' ')[2]}" in page


def test_the_page_s_other_assumptions_give_what_it_says(model: ModuleType) -> None:
    page = (REPOSITORY / "docs/scaling.md").read_text()
    rows = re.findall(r"^\| (?:`(--[^`|]+)`|as above) \|(.*)\|$", page, flags=re.M)
    assert len(rows) >= 10
    losses = ("transformer-engine", "sft", "target-sft-topk", "target-sft-dense")
    for flags, cells in rows:
        found = []
        for name in ("llama3-8b", "llama3-70b"):
            (step,) = model.calculate(
                model.parse(["--model", name, "--gpus", "512", *flags.split()])
            )["steps"]
            found += [f"{100 * step['against_plain'][loss]:+.2f}%" for loss in losses]
        assert [cell.strip() for cell in cells.split("|")] == found, flags


def test_files(model: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert model.main(["--gpus", "8", "--losses", "gem", "--output", str(tmp_path / "out")]) == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        f"scaling_model.{e}" for e in ("json", "md", "png")
    ]
    text = (tmp_path / "out/scaling_model.md").read_text()
    assert "not measured" in text and str(tmp_path) not in text
    assert str(tmp_path) not in (tmp_path / "out/scaling_model.json").read_text()
    assert "operation_us" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--assume speed=2", "--assume speed: valid: mfu"),
        ("--assume mfu=fast", "write NAME=NUMBER"),
        ("--tp 16", "TP inside a node"),
        ("--model llama3-70b --gpus 8", "too few"),
    ],
)
def test_what_cannot_be(
    model: ModuleType, words: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert model.main(words.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and says in error
