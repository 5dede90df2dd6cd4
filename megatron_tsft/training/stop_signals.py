"""SIGTERM and Ctrl-C end a run after the step that is being trained, with a checkpoint."""

import contextlib
import ctypes
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from megatron_tsft.errors import Interrupted

PR_SET_PDEATHSIG = 1  # linux/prctl.h


class StopSignals:
    """Which signal asked this rank to stop.

    A rank that waits for its peers inside a collective runs no Python handler. So the kernel's
    handler writes the signal's number into a pipe (signal.set_wakeup_fd), and a thread reads it:
    where a peer has ended, nobody will come to that collective, and the rank ends at once.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._process = os.getpid()  # a data loader's worker inherits the handlers
        self.training = False  # a step is under way: what comes is answered at its end

    @contextlib.contextmanager
    def installed(self, *more: int) -> Iterator[None]:
        """Inside, SIGTERM, SIGINT and `more` stop the run; only in the main thread."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        signals = {signal.SIGTERM, signal.SIGINT, *more}
        before = {number: signal.signal(number, self._handle) for number in signals}
        wakeup = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        threading.Thread(target=self._listen, args=(reading, signals), daemon=True).start()
        _die_with_torchrun()
        try:
            yield
        finally:
            signal.set_wakeup_fd(wakeup)
            for number, handler in before.items():
                signal.signal(number, handler)
            os.close(writing)  # the thread ends

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return
        again = self.received is not None and not _under_torchrun()
        self.received = number
        if again or not self.training:  # torchrun says it twice; a person means it
            raise Interrupted(number)

    def _listen(self, reading: int, signals: set[Any]) -> None:
        while text := os.read(reading, 1):
            if text[0] in signals and peer_ended():
                os._exit(128 + text[0])
        os.close(reading)


def _under_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def _die_with_torchrun() -> None:
    """Have the kernel send SIGTERM when torchrun is killed: nobody would end this rank then, and it
    would train on beside the one that is started in its place."""
    if sys.platform != "linux" or not _under_torchrun():
        return
    parent = os.getppid()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent or parent == 1:
        os.kill(os.getpid(), signal.SIGTERM)


def peer_ended() -> bool:
    """Whether torchrun has fewer living ranks on this node than it started."""
    parent = os.getppid()
    if not _under_torchrun() or parent == 1:
        return False
    try:
        children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    except OSError:
        return False  # this kernel does not say
    alive = 0
    for child in children:
        with contextlib.suppress(OSError):
            text = Path(f"/proc/{child}/stat").read_text(errors="replace")
            alive += text.rpartition(")")[2].split()[0] not in "ZX"
    return alive < int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
