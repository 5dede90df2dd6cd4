"""SIGTERM and Ctrl-C end a run after the step that is being trained, with a checkpoint."""

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

from megatron_tsft.errors import Interrupted
from megatron_tsft.processes import children_of, state_of

PR_SET_PDEATHSIG = 1  # linux/prctl.h


class StopSignals:
    """Which signal asked this rank to stop.

    A rank that waits for its peers inside a collective runs no Python handler. So the kernel's
    handler writes the signal's number into a pipe (signal.set_wakeup_fd), and a thread reads it:
    where a peer has ended, nobody will come to that collective, and the rank ends at once.

    Ctrl-C, and a scheduler, send their signal to all processes of a job. A data loader's worker, or
    one that writes a part of a checkpoint, obeys its parent alone.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._installed = False
        self._torchrun = os.getppid()
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
        self._installed = True
        os.register_at_fork(after_in_child=self._obey_the_parent)
        before = {number: signal.signal(number, self._handle) for number in signals}
        wakeup = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        threading.Thread(target=self._listen, args=(reading, signals), daemon=True).start()
        _die_with_torchrun()
        try:
            yield
        finally:
            self._installed = False
            signal.set_wakeup_fd(wakeup)
            ending = self.received is not None  # this process; torchrun says it to each rank again
            for number, handler in before.items():
                signal.signal(number, signal.SIG_IGN if ending else handler)
            os.close(writing)  # the thread ends

    def _handle(self, number: int, frame: FrameType | None) -> None:
        again = self.received is not None and not _under_torchrun()
        self.received = number
        if again or not self.training:  # torchrun says it twice; a person means it
            raise Interrupted(number)

    def _obey_the_parent(self) -> None:
        """In a child: ignore signals that others send."""
        if not self._installed:
            return
        self._installed = False  # a grandchild is another one's
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with_the_parent, args=(os.getppid(),), daemon=True).start()

    def _listen(self, reading: int, signals: set[Any]) -> None:
        while text := os.read(reading, 1):
            time.sleep(0.5)  # torchrun itself may be about to end, thread by thread
            if text[0] in signals and peer_ended(self._torchrun):
                os._exit(128 + text[0])
        os.close(reading)


def _end_with_the_parent(parent: int) -> None:
    """End at a SIGTERM of the parent, or of whoever took its place."""
    while True:
        information = signal.sigwaitinfo({signal.SIGTERM})
        if information.si_pid == parent or os.getppid() != parent:
            os._exit(128 + signal.SIGTERM)


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
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGTERM)


def peer_ended(torchrun: int) -> bool:
    """Whether torchrun lives and has fewer living ranks on this node than it started.

    torchrun: its process id.
    """
    if not _under_torchrun() or os.getppid() != torchrun:
        return False
    children = children_of(torchrun)
    if children is None:
        return False
    alive = sum(state_of(child)[0] != "dead" for child in children)
    return alive < int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
