"""benchmarks/top_k.py: the more of a teacher is known, the closer loss and gradient are to the
whole teacher's."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_tsft.data.prepare import prepare
from tests.training.runs import REPOSITORY, make_hf, write_rows


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict:
    folder = tmp_path_factory.mktemp("study")
    student, teacher = make_hf(folder / "a"), make_hf(folder / "b", num_hidden_layers=2)
    prepare(write_rows(folder / "rows.jsonl", 12, 0), student, folder / "data", progress=False)
    command = [
        sys.executable,
        str(REPOSITORY / "benchmarks/top_k.py"),
        "--student",
        str(student),
        "--no-progress",
    ]
    command += [
        "--teacher",
        str(teacher),
        "--data",
        str(folder / "data"),
        "--output",
        str(folder / "out"),
    ]
    command += ["--k", "1", "8", "67"]
    out = subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder)
    assert (folder / "out/top_k.png").stat().st_size > 10_000
    assert out.stdout.count("\n| ") >= 6
    return json.loads((folder / "out/top_k.json").read_text())


def test_errors_vanish_as_k_grows(result: dict) -> None:
    for objective in ("target-sft,eta=0.5", "kd"):
        for tail in ("uniform", "drop"):
            rows = [
                row
                for row in result["rows"]
                if (row["objective"], row["tail"]) == (objective, tail)
            ]
            assert [row["k"] for row in rows] == [1, 8, 67]
            gradients = [row["gradient_error"] for row in rows]
            assert gradients[0] > gradients[1] > 10 * gradients[2], (objective, tail)
            assert gradients[2] < 2e-3  # what fp16 rounds
            assert rows[2]["loss_error"] < 1e-3
            assert rows[2]["tail_mass"] == 0 < rows[1]["tail_mass"] < rows[0]["tail_mass"]
            assert [row["bytes_per_token"] for row in rows] == [12, 54, 408]


def test_an_objective_without_a_teacher_is_refused(tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(REPOSITORY / "benchmarks/top_k.py"),
        "--student",
        "a",
        "--teacher",
        "b",
    ]
    command += ["--data", "c", "--output", str(tmp_path), "--objective", "sft"]
    out = subprocess.run(command, capture_output=True, text=True)
    assert out.returncode == 2 and out.stderr.startswith("error: --objective sft reads no teacher")
