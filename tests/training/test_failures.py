"""What a machine does to a run is one line that says what to do."""

import errno
import os
import shutil
import time
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch.distributed.checkpoint.api import CheckpointException

from megatron_tsft.checkpoint.folder import latest_checkpoint
from megatron_tsft.errors import UserError
from megatron_tsft.plan import meeting as meetings
from megatron_tsft.plan.command_line import Ranks
from megatron_tsft.plan.meeting import Meeting, StoreMeeting
from megatron_tsft.training.failures import explain
from tests.ports import free_port
from tests.training.runs import World

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def plan(world: World, tmp_path: Path) -> Any:
    base = latest_checkpoint(world.base)
    flags = SimpleNamespace(save=str(tmp_path), bf16=False, fp16=False)
    return SimpleNamespace(flags=flags, start=SimpleNamespace(base=base, folder="runs/a"))


def said(error: BaseException, plan: Any) -> str:
    told = explain(error, plan, Meeting(), 7)
    return "" if told is None else str(told)


def worker_failed() -> BaseException:
    """As Megatron's writer tells of it: the number of the error is lost."""
    inner = RuntimeError("Worker failure: An error is caught, error: <class 'OSError'>")
    return CheckpointException("write", {0: (inner, None)})  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), worker_failed()]
)
def test_a_full_disk(
    error: BaseException, plan: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 10**9, 12345))
    text = said(error, plan)
    assert text.startswith(f"no space left in {tmp_path}, for the checkpoint of step 7: one needs")
    assert "MB, 0.0123 MB are free" in text and "--tsft-keep-last" in text


def test_room_enough_is_no_full_disk(plan: Any) -> None:
    assert said(worker_failed(), plan) == ""


def test_too_many_files(plan: Any) -> None:
    for error in (
        OSError(errno.EMFILE, "Too many open files"),
        RuntimeError("[enforce fail at device.cc:189] rv != -1. -1 vs -1. Too many open files"),
    ):
        assert said(error, plan).startswith("too many open files, the limit is ")
        assert "ulimit -n" in said(error, plan)


def test_what_a_chain_hides(plan: Any) -> None:
    try:
        try:
            raise OSError(errno.EMFILE, "Too many open files")
        except OSError as error:
            raise RuntimeError("worker") from error
    except RuntimeError as error:
        assert said(error, plan).startswith("too many open files")
    assert said(RuntimeError("a defect"), plan) == ""


def ask(rank: int, port: int, ranks: int) -> dict[int, str]:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks)}
    meetings.CALL = 2.0
    meeting = StoreMeeting(Ranks(rank, ranks))
    assert meeting.share(lambda: rank) == 0 and meeting.gather(rank) == list(range(ranks))
    if rank == ranks - 1:
        return {}  # hangs
    error = RuntimeError("Timed out waiting 60000ms for recv operation to complete")
    plan: Any = SimpleNamespace(flags=SimpleNamespace(save=None))
    told = explain(error, plan, meeting, 3)
    assert isinstance(told, UserError) and told.met_here_alone
    assert str(told).startswith(f"step 3: rank {ranks - 1} on {os.uname().nodename} did not come")
    return meeting.absent()


def test_a_rank_that_hangs_is_named() -> None:
    port, children = free_port(), []
    for rank in range(3):
        if not (child := os.fork()):
            status = 1
            try:
                status = int(ask(rank, port, 3) not in ({}, {2: os.uname().nodename}))
                if rank == 0:
                    time.sleep(6)  # its store serves the others
            finally:
                os._exit(status)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
