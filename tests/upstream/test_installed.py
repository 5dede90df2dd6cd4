"""Another megatron in the way of the installed one is named, and refused outside the tested
range."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from megatron_tsft.upstream.installed import TESTED, check_megatron

REPOSITORY = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-m", "megatron_tsft.training.pretrain_gpt", "--tsft-device", "cpu"]


def test_the_range_is_pyprojects() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needs = [*project["dependencies"], *project["optional-dependencies"]["train"]]
    assert f"megatron-core{TESTED}" in needs


def test_the_installed_one_passes() -> None:
    check_megatron()


@pytest.mark.parametrize(("patch", "code"), [("0.15.0", 2), ("", 2)])
def test_a_checkout_in_the_working_directory(tmp_path: Path, patch: str, code: int) -> None:
    core = tmp_path / "megatron" / "core"
    core.mkdir(parents=True)
    (core / "__init__.py").write_text("raise SystemExit('it was imported')\n")
    if patch:
        numbers = zip(("MAJOR", "MINOR", "PATCH"), patch.split("."), strict=True)
        text = "".join(f"{name} = {number}\n" for name, number in numbers)
        (core / "package_info.py").write_text(text)
    environment = {"PYTHONPATH": str(REPOSITORY), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        COMMAND, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    lines = done.stderr.strip().splitlines()
    assert done.returncode == code and len(lines) == 1, done.stderr
    assert lines[0].startswith(f"error: megatron.core would come from {core}, version {patch or 0}")
    assert "start from another folder" in lines[0]
