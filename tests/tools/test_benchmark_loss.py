"""tools/benchmark_loss.py: its files agree, what cannot run is named, its arithmetic is right. No
time is judged."""

import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from megatron_tsft import q_target_cross_entropy
from megatron_tsft.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "benchmark_loss.py"


@pytest.fixture
def part(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module beside the tool, by its short name."""
    monkeypatch.syspath_prepend(str(TOOL.parent))
    return lambda name: importlib.import_module(f"benchmarks.{name}")


@pytest.fixture
def tool(part: Any) -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_loss", TOOL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def start(*words: object) -> subprocess.CompletedProcess[str]:
    """The tool as a user starts it."""
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    line = [sys.executable, str(TOOL), *map(str, words)]
    return subprocess.run(line, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.slow
def test_a_run_writes_three_files_that_agree(tmp_path: Path) -> None:
    names = [
        "ours-torch",
        "ours-torch-inplace",
        "plain-autograd",
        "F.cross_entropy",
        "quack",
        "matmul+ours",
    ]
    words = [
        "--quick",
        "--repeat",
        2,
        "--objectives",
        "sft",
        "target-sft-dense",
        "--implementations",
        *names,
    ]
    done = start("--output", tmp_path / "out", "--no-progress", *words)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "out" / "benchmark_loss.json").read_text())
    text = (tmp_path / "out" / "benchmark_loss.md").read_text()
    assert (tmp_path / "out" / "benchmark_loss.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        f"benchmark_loss.{ending}" for ending in ("json", "md", "png")
    ]
    assert result["environment"]["device"] == "cpu" and not result["interrupted"]
    assert str(tmp_path) not in json.dumps(result) + text

    logits, head = result["sections"]
    assert (logits["part"], head["part"]) == ("logits", "head")
    rows = {
        (row["objective"], row["implementation"]): row for s in (logits, head) for row in s["rows"]
    }
    absent = rows.pop(("sft", "quack"))
    assert (
        absent["status"] == "absent"
        and "not installed" in absent["reason"]
        or absent["reason"] == "needs a GPU"
    )
    assert f"quack: {absent['reason']}" in done.stdout and f"quack: {absent['reason']}" in text
    both, names_of_both = (
        ("sft", "target-sft-dense"),
        ("ours-torch", "ours-torch-inplace", "plain-autograd"),
    )
    wanted = {(key, name) for key in both for name in (*names_of_both, "matmul+ours")}
    assert set(rows) == wanted | {("sft", "F.cross_entropy")}
    for (key, name), row in rows.items():
        assert row["status"] == "measured" and len(row["times_ms"]) == 2, row
        assert 0 < row["min_ms"] <= row["median_ms"] and row["difference"] < 0.02
        assert row["extra_bytes"] == max(0, row["peak_bytes"] - row["gradient_bytes"])
        inplace = name.endswith("inplace")  # the gradient lies in the logits
        assert name == "matmul+ours" or row["gradient_bytes"] == (
            0 if inplace else row["logits_bytes"]
        )
        assert f"| {key} | {name} | {row['median_ms']:.2f} |" in text
    assert rows["sft", "ours-torch"]["ratios"]["floor"] == pytest.approx(
        rows["sft", "ours-torch"]["median_ms"] / (1.5 * logits["copy_ms"])
    )
    verdicts = {target["target"]: target["verdict"] for target in result["targets"]}
    assert verdicts["sft: time of ours-torch / F.cross_entropy"] in ("met", "not met")
    assert verdicts["sft: time of ours-torch / megatron"] == "not measured"


def test_a_wrong_input_is_one_line(tmp_path: Path) -> None:
    done = start("--output", tmp_path / "out", "--shapes", "12")
    assert done.returncode == 2 and done.stdout == ""
    assert (
        done.stderr.startswith("error: --shapes 12: write TOKENSxVOCABULARY")
        and done.stderr.count("\n") == 1
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--objectives sfft", "--objectives sfft: no such name; valid: sft, dft"),
        ("--implementations ours", "--implementations ours: no such name; valid: ours-torch"),
        ("--dtypes fp8", "--dtypes fp8: no such name; valid: bf16, fp32"),
        ("--shapes 8x16/4 --tp 2", "cut into 4 shards but --tp is 2"),
        ("--repeat 0", "--repeat 0: it must be at least 1"),
        ("--objectives dft --implementations megatron", "nothing to measure"),
    ],
)
def test_what_cannot_be_is_said_before_anything_runs(
    tool: ModuleType, words: str, says: str
) -> None:
    with pytest.raises(UserError, match=re.escape(says)):
        tool.plan(tool.parse(["--output", "out", *words.split()]), "cpu")


def test_shapes(part: Any) -> None:
    shape = part("inputs").Shape.parse("8192x151936/8")
    assert (shape.tokens, shape.vocabulary, shape.tp, shape.columns) == (8192, 151936, 8, 18992)
    assert str(shape) == "8192x151936/8"
    for wrong in ("8192", "0x5", "8x5/0", "8x5/2", "axb"):
        with pytest.raises(UserError, match="--shapes"):
            part("inputs").Shape.parse(wrong)


def test_a_floor_is_the_copy_of_as_many_bytes(part: Any) -> None:
    assert part("targets").floor_ms(10.0, 2) == 10.0  # a copy moves twice the bytes
    assert part("targets").floor_ms(10.0, 3) == 15.0
    assert part("targets").floor_ms(10.0, 5) == 25.0


def section(part_name: str, **medians: float) -> dict[str, Any]:
    """A made-up section: medians by 'objective implementation', 1 MB of extra memory a row, 4 MB of
    logits."""
    rows = [
        {
            "objective": k.split()[0],
            "implementation": k.split()[1],
            "median_ms": v,
            "extra_bytes": 1e6,
        }
        for k, v in medians.items()
    ]
    return {
        "shape": "8192x131072",
        "dtype": "bf16",
        "part": part_name,
        "logits_bytes": 4e6,
        "floor_ms": {"sft": 4.0},
        "rows": [row | {"status": "measured"} for row in rows],
    }


def test_targets_divide_the_right_rows(part: Any) -> None:
    judge = part("targets").judge
    made = section(
        "logits", **{"sft ours-torch": 5.0, "sft F.cross_entropy": 10.0, "gem ours-torch": 9.0}
    )
    found = {row["target"]: row for row in judge([made], "cpu", 1)}
    assert found["sft: time of ours-torch / F.cross_entropy"] == {
        "section": "8192x131072 bf16 logits",
        "target": "sft: time of ours-torch / F.cross_entropy",
        "measured": 0.5,
        "to_reach": 0.55,
        "verdict": "met",
    }
    assert found["gem: time of ours-torch / sft F.cross_entropy"]["verdict"] == "not met"
    assert found["gem: time of ours-torch / sft ours-torch"]["measured"] == pytest.approx(1.8)
    assert found["dft: time of ours-torch / sft F.cross_entropy"]["verdict"] == "not measured"
    assert {row["verdict"] for row in judge([made], "cpu", 2)} == {
        "not measured"
    }  # they are for one thread

    made = section(
        "logits", **{"sft ours-triton": 5.0, "sft liger": 4.0, "sft F.cross_entropy": 9.0}
    )
    found = {row["target"]: row for row in judge([made], "cuda", 1)}
    assert found["sft: time of ours-triton / floor"]["measured"] == 1.25
    assert found["sft: time of ours-triton / floor"]["verdict"] == "met"
    assert found["sft: time of ours-triton / fastest peer"]["measured"] == 1.25
    assert found["sft: time of ours-triton / fastest peer"]["verdict"] == "not met"

    made = section("head", **{"sft ours-fused": 14.0, "sft matmul+ours": 10.0})
    found = {row["target"]: row for row in judge([made], "cpu", 1)}
    assert found["sft: time of ours-fused / matmul+ours"]["verdict"] == "met"
    assert found["sft: extra memory of ours-fused / logits' bytes"]["measured"] == 0.25


@pytest.mark.parametrize(
    "key", ["sft", "dft", "gem", "target-sft-eta0", "target-sft-dense", "target-sft-topk"]
)
def test_plain_autograd_computes_the_same_loss(part: Any, key: str) -> None:
    """The baseline must not be another loss."""
    inputs, peers = part("inputs"), part("peers")
    shape = inputs.Shape(6, 200)
    case = inputs.make_case(inputs.Section(shape, "fp32", "logits", 8, 1, 3, "cpu", (key,)))
    case = replace(case, key=key)
    ours = q_target_cross_entropy(
        case.leaves[0], case.labels, inputs.CHOICES[key].objective(), teacher=case.teacher
    )
    plain = peers.plain_loss(key, case.leaves[0], case.labels, case.teacher)
    torch.testing.assert_close(plain, ours.loss, rtol=1e-4, atol=1e-5)
    (a,), (b,) = peers.gradients(plain, case), peers.gradients(ours.loss, case)
    torch.testing.assert_close(
        a, b, rtol=1e-4, atol=1e-5
    )  # at the label autograd subtracts numbers that are alike


def test_help_has_an_example(tool: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        tool.parse(["--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0 and "example" in text and "tools/benchmark_loss.py" in text
