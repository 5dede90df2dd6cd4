"""benchmarks/step.py: both sides take the same steps on the same packs, its files agree. No
time is judged."""

import json
import os
import re
import subprocess
import sys
from typing import Any

import pytest

from benchmarks import step
from megatron_tsft.errors import UserError
from tests.training.runs import REPOSITORY

TOOL = REPOSITORY / "benchmarks" / "step.py"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """What a small run of everything wrote: (step.json, step.md)."""
    folder = tmp_path_factory.mktemp("step")
    words = (
        "--model tiny --seq-length 64 --packs 3 --supervised 0.6 --pairs 2 --startup-pairs 1"
        " --objectives plain target-sft sft --no-progress"
    ).split()
    line = [sys.executable, str(TOOL), "--output", str(folder / "out"), *words]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(line, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert sorted(path.name for path in (folder / "out").iterdir()) == ["step.json", "step.md"]
    text = (folder / "out" / "step.md").read_text()
    assert done.stdout.startswith(text) and str(folder) not in text
    assert done.stdout.endswith(f"wrote step.json, step.md into {folder / 'out'}\n")
    return json.loads((folder / "out" / "step.json").read_text()), text


@pytest.mark.slow
def test_both_sides_take_the_same_steps(written: tuple[dict[str, Any], str]) -> None:
    rows = {(row["dtype"], row["objective"]): row["pairs"] for row in written[0]["steps"]}
    names = ["plain", "target-sft", "sft"]
    assert list(rows) == [(dtype, name) for dtype in ("fp32", "bf16") for name in names]
    for (dtype, name), pairs in rows.items():
        first = rows[dtype, "plain"][0]["plain"]
        assert len(pairs) == 2 and all(
            pair["plain"]["loss"] == first["loss"] for pair in pairs
        )  # nothing moved
        for pair in pairs:
            if name in ("plain", "sft"):  # bf16: the gradient of the logits is rounded to it
                assert pair["ours"]["loss"] == pytest.approx(first["loss"], abs=1e-5)
                rounding = 1e-5 if dtype == "fp32" else 1e-2
                assert pair["ours"]["grad_norm"] == pytest.approx(first["grad_norm"], rel=rounding)
            else:
                assert abs(pair["ours"]["loss"] - first["loss"]) > 1e-3


@pytest.mark.slow
def test_the_files_agree(written: tuple[dict[str, Any], str]) -> None:
    result, text = written
    assert [row["model"] for row in result["startup"]] == ["tiny"] and len(
        result["startup"][0]["pairs"]
    ) == 1
    for row in result["steps"] + result["startup"]:
        ratios = [pair["ours"]["cpu"] / pair["plain"]["cpu"] for pair in row["pairs"]]
        kept = row["cpu_ratio"]
        assert (
            kept["min"]
            == min(ratios)
            <= kept["q1"]
            <= kept["median"]
            <= kept["q3"]
            <= max(ratios)
            == kept["max"]
        )
        cells = (
            f"| {len(ratios)} | {row['plain_cpu']:.2f} | {row['ours_cpu']:.2f} |"
            f" {kept['median']:.3f} |"
        )
        assert text.count(cells) >= 1
    assert (
        f"    {result['command']}\n" in text
        and result["environment"]["versions"]["megatron-core"] in text
    )


def test_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        step.parse(["--help"])
    assert (
        end.value.code == 0 and "benchmarks/step.py --output runs/step" in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--pairs 0", "--pairs 0: it must be at least 1"),
        ("--supervised 0", "--supervised 0: it is a share"),
        ("--seq-length 4096", "--seq-length 4096: the model has 2048 positions"),
        (f"--output {TOOL}", f"--output {TOOL} is a file"),
    ],
)
def test_what_cannot_be_is_said_before_anything_runs(words: str, says: str) -> None:
    with pytest.raises(UserError, match=re.escape(says)):
        step.check(step.parse(["--output", "out", *words.split()]))
