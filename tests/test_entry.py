"""Every error is one line that comes last; a worker's and another rank's, too."""

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from torch.utils.data import DataLoader, Dataset

from megatron_tsft import entry
from megatron_tsft.errors import UserError
from tests.fresh import fresh


def ends(body: Callable[[], int], capsys: pytest.CaptureFixture[str]) -> tuple[int, list[str]]:
    """The exit status, and the lines on standard error."""
    status = entry.run_command(body, name="the work", left="; nothing is left")
    return status, capsys.readouterr().err.strip().splitlines()


def raising(error: BaseException) -> Callable[[], int]:
    def body() -> int:
        raise error

    return body


def test_what_a_user_can_mend(capsys: pytest.CaptureFixture[str]) -> None:
    assert ends(raising(UserError("--x 3: pass 4")), capsys) == (2, ["error: --x 3: pass 4"])
    full = OSError(errno.ENOSPC, "No space left on device", "folder")
    status, lines = ends(raising(full), capsys)
    assert status == 2 and lines[0].startswith("error: the work stopped: [Errno 28] No space")
    assert lines[0].endswith("; nothing is left") and len(lines) == 1
    status, lines = ends(raising(KeyboardInterrupt()), capsys)
    assert (status, lines) == (130, ["error: the work stopped: interrupted; nothing is left"])
    assert ends(lambda: 1, capsys) == (1, [])


def test_an_error_of_several_lines_is_one(capsys: pytest.CaptureFixture[str]) -> None:
    lines = ["error: plugin: boom second line"]
    assert ends(raising(UserError("plugin: boom\nsecond line")), capsys) == (2, lines)


def test_a_reader_that_is_gone_is_no_error(tmp_path: Path) -> None:
    program = (
        "import sys\nfrom megatron_tsft.entry import run_command\n"
        "def body():\n"
        "    for _ in range(100000): print('line', flush=True)\n"
        "    return 0\n"
        "sys.exit(run_command(body))\n"
    )
    command = '"$0" -c "$1" | head -1'
    line = ["sh", "-c", command, sys.executable, program]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.stdout == "line\n" and done.stderr == ""


def test_a_defect_has_its_traceback_and_then_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    status, lines = ends(raising(KeyError("a\nb")), capsys)
    assert status == 1 and "Traceback" in lines[0]
    assert lines[-1] == r"error: KeyError: 'a\nb'"


class Broken(Dataset[int]):
    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> int:
        raise UserError(f"conversation {index} is damaged: prepare the data again")


def test_a_data_loader_workers_error(capsys: pytest.CaptureFixture[str]) -> None:
    def body() -> int:
        return len(list(DataLoader(Broken(), num_workers=1, multiprocessing_context="fork")))

    assert ends(body, capsys) == (2, ["error: conversation 0 is damaged: prepare the data again"])


def test_torchrun_is_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    monkeypatch.setenv("RANK", "3")
    error = UserError("--x 3: pass 4")
    error.met_here_alone = True
    assert ends(raising(error), capsys) == (2, ["error (rank 3): --x 3: pass 4"])
    said = json.loads((tmp_path / "error.json").read_text())
    assert said["message"]["message"] == "error (rank 3): --x 3: pass 4"


def alone() -> None:
    """In an interpreter of its own: a job of one rank, on a port that the kernel chose as it was
    taken; a port that is looked up before may be somebody else's by then."""
    import torch
    import torch.distributed as dist

    for name in ("WORLD_SIZE", "RANK", "MASTER_PORT"):
        os.environ.pop(name, None)
    entry.be_a_rank()
    assert os.environ["MASTER_PORT"] == "0"
    dist.init_process_group("gloo")
    total = torch.ones(1)
    dist.all_reduce(total)
    assert (dist.get_rank(), dist.get_world_size(), float(total)) == (0, 1, 1.0)
    dist.destroy_process_group()


def test_a_job_of_one_rank_needs_no_port_before_it_starts() -> None:
    fresh(alone)
