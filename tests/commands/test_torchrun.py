"""Under our torchrun the error that stopped a run is the last line."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_tsft.commands.torchrun import last_words

REPOSITORY = Path(__file__).resolve().parents[2]
FLAGS = "--nproc-per-node 2 --rdzv-backend c10d --rdzv-endpoint 127.0.0.1:0 --local-addr 127.0.0.1"


def start(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megatron_tsft.commands.torchrun", *FLAGS.split()]
    return subprocess.run(
        [*command, str(program), *arguments],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=180,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("body", "last", "code"),
    [
        ("raise UserError('--x 3: pass 4')", "error: --x 3: pass 4", 2),
        ("raise RuntimeError('broken')", "error: RuntimeError: broken", 1),
        ("os.kill(os.getpid(), 9)", "signal SIGKILL", 1),
        ("return 0", "", 0),
    ],
    ids=["user", "defect", "killed", "well"],
)
def test_the_last_line(tmp_path: Path, body: str, last: str, code: int) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import os, sys, time\n"
        "from megatron_tsft.entry import run_command\n"
        "from megatron_tsft.errors import UserError\n"
        "def body():\n"
        f"    if os.environ['RANK'] == '1' and {bool(last)}:\n"
        "        time.sleep(20)\n"
        f"    {body}\n"
        "sys.exit(run_command(body))\n"
    )
    done = start(program)
    assert done.returncode == code, done.stderr
    lines = done.stderr.strip().splitlines()
    if last:
        assert lines[-1].startswith("error") and last in lines[-1], done.stderr
    assert "ChildFailedError" not in done.stderr


def test_words_of_a_rank_that_said_nothing() -> None:
    failure = SimpleNamespace(
        message="Signal 9 (SIGKILL)",
        exitcode=-9,
        local_rank=1,
        signal_name=lambda: "SIGKILL",
    )
    text = last_words(3, failure)
    assert text.startswith("error: rank 3 (local rank 1 of ") and "memory ran out" in text
