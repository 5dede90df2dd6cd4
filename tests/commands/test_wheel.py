"""The package as it is installed: a wheel beside the environment runs every command of a user's."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPTS = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["scripts"]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that `pip install --no-deps --target` filled."""
    folder = tmp_path_factory.mktemp("installed")
    source = folder / "source"  # pip builds in the tree: not in ours
    copied = ["git", "ls-files", "-z", "megatron_tsft", "pyproject.toml", "README.md", "LICENSE"]
    files = subprocess.run(copied, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    for name in filter(None, files.stdout.split("\0")):
        if (REPOSITORY / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((REPOSITORY / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
    done = subprocess.run(
        [*pip, "--target", str(folder / "site"), str(source)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return folder / "site"


def run(site: Path, name: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(site / "bin" / name), *arguments]
    return subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_every_command_says_how_it_is_used(installed: Path, tmp_path: Path, name: str) -> None:
    done = run(installed, name, "--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "usage: " in done.stdout and done.stderr == ""


@pytest.mark.slow
def test_from_a_folder_to_a_trained_model(installed: Path, tmp_path: Path) -> None:
    """Each of them works, from the installed package alone."""
    from tests.training.runs import BATCH, make_hf, write_rows

    make_hf(tmp_path / "hf")
    write_rows(tmp_path / "rows.jsonl", 12, 0)
    where = (installed, tmp_path)
    for command in (
        "tsft-prepare --input rows.jsonl --tokenizer hf --output data --no-progress",
        "tsft-convert import --hf hf --megatron base --no-progress",
        "tsft-cache --teacher hf --data data --output cache --top-k 4 --device cpu --no-progress",
        "tsft-inspect-cache cache --data data --no-progress",
        "tsft-train --tsft-model base --tsft-data data --tsft-teacher-cache cache --save run"
        f" --tsft-device cpu --train-iters 1 {BATCH}",
        "tsft-convert export --megatron run --hf new --no-progress",
    ):
        name, *arguments = command.split()
        done = run(where[0], name, *arguments, cwd=where[1])
        assert done.returncode == 0, (command, done.stdout[-2000:], done.stderr[-2000:])
    assert (tmp_path / "new" / "config.json").is_file()
    assert (tmp_path / "run" / "metrics.jsonl").read_text().count("\n") == 1
    place = run(installed, "tsft-prepare", "--help", cwd=tmp_path)
    assert place.stdout.startswith("usage: tsft-prepare")
