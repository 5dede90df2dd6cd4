"""A lock has one holder: the second is told who, and a dead one is in nobody's way."""

import dataclasses
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_tsft import lock as locks
from megatron_tsft.errors import UserError
from megatron_tsft.lock import Holder, hold

HOLDER = """
import sys, time
from pathlib import Path
from megatron_tsft.lock import hold
with hold(Path(sys.argv[1]), "it"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "lock"


def start_holder(path: Path) -> subprocess.Popen[str]:
    """Another process that holds the lock until it is killed."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()
    assert process.stdout is not None
    process.stdout.close()


def write_lock(path: Path, **changed: Any) -> Holder:
    """A lock file of a process on another machine, unless told otherwise."""
    path.touch()
    values = {"host": "far", "machine": "far", "pid": 1, "inode": path.stat().st_ino} | changed
    holder = dataclasses.replace(Holder.this_process(0), **values)
    path.write_text(json.dumps(dataclasses.asdict(holder)))
    return holder


def test_the_second_is_told_who_holds_it_and_the_file_goes_with_the_holder(path: Path) -> None:
    with hold(path, "runs/a"):
        with (
            pytest.raises(UserError, match=rf"runs/a is in use by process {os.getpid()} on "),
            hold(path, "runs/a"),
        ):
            raise AssertionError("not reached")
        assert path.is_file()
    assert not path.exists()


def test_one_that_was_killed_is_taken_over_at_once(path: Path) -> None:
    process = start_holder(path)
    with pytest.raises(UserError, match=f"process {process.pid} "), hold(path, "it"):
        raise AssertionError("not reached")
    os.kill(process.pid, signal.SIGKILL)
    while Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
        time.sleep(0.01)
    begun = time.monotonic()
    with hold(path, "it"):  # it is a zombie still: nobody has waited for it
        assert time.monotonic() - begun < locks.STALE / 2
    end(process)


def test_a_start_waits_for_one_that_lives_to_end(path: Path) -> None:
    process, said = start_holder(path), list[str]()
    killer = multiprocessing.get_context("fork").Process(
        target=lambda: (time.sleep(1), os.kill(process.pid, signal.SIGKILL))
    )
    killer.start()
    with hold(path, "it", patience=30, say=said.append):
        pass
    killer.join()
    end(process)
    assert len(said) == 1 and f"in use by process {process.pid}" in said[0]


@pytest.mark.parametrize(
    "changed",
    [
        {"machine": locks._machine(), "pid": os.getpid(), "started": "1"},  # the number again
        {"machine": locks._machine(), "pid": 2**22 + 1},
        {"inode": -1},  # a copy of the folder
        {"job": "77"},  # requeued on another node
        {"job": "77", "step": "0", "restart": "1"},
    ],
)
def test_taken_over_at_once(
    path: Path, monkeypatch: pytest.MonkeyPatch, changed: dict[str, Any]
) -> None:
    write_lock(path, **changed)
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2" if changed.get("restart") else "0")
    if changed.get("step"):
        monkeypatch.setenv("SLURM_STEP_ID", "1")
    begun = time.monotonic()
    with hold(path, "it"):
        assert time.monotonic() - begun < locks.STALE / 2


@pytest.mark.parametrize("job", ["", "78", "77"])
def test_one_on_another_machine_is_watched(
    path: Path, monkeypatch: pytest.MonkeyPatch, job: str
) -> None:
    monkeypatch.setattr(locks, "LOOK", 0.02)
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_STEP_ID", "1")
    holder = write_lock(path, job=job, step="0")  # of one start of a job, two steps may live
    os.utime(path, (10**10, 10**10))  # clocks differ: the file's time is only watched
    begun = time.monotonic()
    with hold(path, "it", stale=0.3) as lock:
        assert 0.3 <= time.monotonic() - begun < 10
        assert holder.token != lock.token


def test_one_on_another_machine_that_lives_is_not_robbed(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "LOOK", 0.02)
    write_lock(path)
    ticks = iter(range(10**6))
    read = locks._read

    def beating(path: Path) -> Any:
        os.utime(path, ns=(0, next(ticks)))
        return read(path)

    monkeypatch.setattr(locks, "_read", beating)
    with pytest.raises(UserError, match="process 1 on far"), hold(path, "it", stale=0.3):
        raise AssertionError("not reached")
    assert path.is_file()


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff", b'{"pid": 1}'])
def test_a_file_that_was_not_written_to_its_end_is_watched_too(
    path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    monkeypatch.setattr(locks, "LOOK", 0.02)
    path.write_bytes(content)
    begun = time.monotonic()
    with hold(path, "it", stale=0.2):
        assert time.monotonic() - begun >= 0.2


def test_a_child_does_not_give_it_back(path: Path) -> None:
    with hold(path, "it") as lock:
        child = os.fork()
        if not child:
            lock.release()
            os._exit(0)
        os.waitpid(child, 0)
        lock.check()


def test_who_was_robbed_notices_and_leaves_the_new_one(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "BEAT", 0.02)
    with pytest.raises(UserError, match="it was taken over by process 1 on far"):
        with hold(path, "it") as lock:
            lock.check()
            path.unlink()
            write_lock(path)
            while not lock.lost:  # the heartbeat sees it, too
                time.sleep(0.01)
            lock.check()
    assert path.is_file()


def test_the_heartbeat_is_seen(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "BEAT", 0.02)
    with hold(path, "it"):
        before = path.stat().st_mtime_ns
        deadline = time.monotonic() + 20
        while path.stat().st_mtime_ns == before:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def take(path: Path, barrier: Any, together: Any, most: Any) -> None:
    barrier.wait()
    try:
        with hold(path, "it"):
            with together.get_lock():
                together.value += 1
                most.value = max(most.value, together.value)
            time.sleep(0.2)
            with together.get_lock():
                together.value -= 1
    except UserError:
        pass


def test_of_many_that_rob_a_dead_one_one_holds_it(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    for number in range(6):
        path = tmp_path / str(number)
        write_lock(path, machine=locks._machine(), pid=2**22 + 1)
        barrier = context.Barrier(6)
        together, most = context.Value("i", 0), context.Value("i", 0)
        takers = [
            context.Process(target=take, args=(path, barrier, together, most)) for _ in range(6)
        ]
        for taker in takers:
            taker.start()
        for taker in takers:
            taker.join()
        assert most.value == 1 and not path.exists()
        assert list(tmp_path.iterdir()) == []


def test_a_folder_that_was_copied_with_its_lock_is_free(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with hold(tmp_path / "a" / "lock", "a"):
        shutil.copytree(tmp_path / "a", tmp_path / "b")
        with hold(tmp_path / "b" / "lock", "b") as copied:
            copied.check()
        assert not (tmp_path / "b" / "lock").exists() and (tmp_path / "a" / "lock").exists()


def test_whoever_was_killed_while_it_removed_a_dead_ones_lock(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "LOOK", 0.02)
    monkeypatch.setattr(locks, "BEAT", 0.1)
    dead = write_lock(path, machine=locks._machine(), pid=2**22 + 1)
    path.with_name(f"{path.name}.{dead.token}.old").touch()
    begun = time.monotonic()
    with hold(path, "it", stale=0.2):
        assert 0.3 <= time.monotonic() - begun < 20
    assert list(path.parent.iterdir()) == []
