"""What is known of other processes, and that a kernel that says nothing is believed."""

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from megatron_tsft.processes import children_of, state_of
from megatron_tsft.training import stop_signals


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield process
    process.kill()
    process.communicate()


def test_states(child: subprocess.Popen[bytes]) -> None:
    state, started = state_of(child.pid)
    assert state == "alive" and int(started) > 0
    assert child.pid in (children_of(os.getpid()) or [])
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # ended, and nobody has waited for it
    assert state_of(child.pid) == ("dead", started)
    assert state_of(2**22 + 1) == ("dead", "")
    assert children_of(2**22 + 1) is None


@pytest.mark.parametrize(("children", "ended"), [(None, False), ([], True), ([os.getpid()], True)])
def test_a_peer_that_ended(
    monkeypatch: pytest.MonkeyPatch, children: list[int] | None, ended: bool
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(stop_signals, "children_of", lambda pid: children)
    assert stop_signals.peer_ended(os.getppid()) is ended
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1" if children else "0")
    assert not stop_signals.peer_ended(os.getppid())
