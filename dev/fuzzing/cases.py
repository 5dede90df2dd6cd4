"""Cases in processes of their own, which have a limit of memory and of time; a case is a function
of target, seed and number."""

import contextlib
import functools
import json
import logging
import multiprocessing
import multiprocessing.connection
import os
import random
import resource
import shutil
import signal
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fuzzing.captured import Fault, Refused
from fuzzing.damage import damage
from fuzzing.targets import TARGETS

ALLOWED = ("refused", "same", "changed")
OUTCOMES = (*ALLOWED, "other", "traceback", "half-written", "hang", "crash")
MEMORY = 3 << 30  # bytes above what a process has when it begins
SECONDS = 30  # of a case
CASES_A_PROCESS = 250  # then another one takes its place, so that nothing grows without end


@dataclass(frozen=True)
class Case:
    target: str
    seed: int
    number: int


@dataclass(frozen=True)
class Ended:
    """How a case ended: an outcome, what had been done, and what was said."""

    case: Case
    outcome: str
    done: str
    detail: str
    seconds: float


def prepare_targets(work: Path, names: Sequence[str]) -> None:
    """Make the inputs and what comes of them whole; in a process of its own, because this one is
    going to fork."""
    process = multiprocessing.get_context("fork").Process(target=_make, args=(work, names))
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit("error: the inputs could not be made: see above")


def _make(work: Path, names: Sequence[str]) -> None:
    for name in names:
        root, target = work / name, TARGETS[name]
        root.mkdir(parents=True)
        target.make(root)
        whole, out = root / "whole", root / "first"
        # what reads may write where it reads
        backup = shutil.copytree(whole, root / "kept")
        out.mkdir()
        result = target.read(whole, out, root)
        shutil.rmtree(whole)
        backup.rename(whole)
        shutil.rmtree(out)
        (root / "whole.json").write_text(json.dumps(result))


def run_case(work: Path, case: Case, place: Path) -> Ended:
    """One case, in this process; `place` is a folder of its own, which is emptied."""
    root, target, start = work / case.target, TARGETS[case.target], time.monotonic()
    shutil.rmtree(place, ignore_errors=True)
    folder, out = place / "in", place / "out"
    out.mkdir(parents=True)
    shutil.copytree(root / "whole", folder)
    done = damage(folder, random.Random(f"{case.target}/{case.seed}/{case.number}"))
    try:
        result = json.loads(json.dumps(target.read(folder, out, root)))
        whole = json.loads((root / "whole.json").read_text())
        outcome = target.judge(result, whole, folder, root / "whole")
        detail = "" if outcome in ALLOWED else "something else came of it, and nobody said so"
    except Refused as refusal:
        outcome, detail = "refused", str(refusal)
    except Fault as fault:
        outcome, detail = fault.outcome, str(fault)
    return Ended(case, outcome, done, detail, time.monotonic() - start)


def _work(work: Path, place: Path, pipe: Any) -> None:
    """A process: the cases that the pipe says, one after the other."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.fsync = lambda fd: None  # nothing here has to be there after a power failure
    with open("/proc/self/statm") as file:
        size = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    while (case := pipe.recv()) is not None:
        pipe.send(run_case(work, case, place))


class _Process:
    """A process, the case that it has, and when it began."""

    def __init__(self, work: Path, number: int) -> None:
        self.work, self.number, self.left = work, number, 0
        self.case: Case | None = None

    def give(self, case: Case) -> None:
        if not self.left:
            self.end()
            context = multiprocessing.get_context("fork")
            self.pipe, theirs = context.Pipe()
            place = self.work / f"case{self.number}"
            self.process = context.Process(target=_work, args=(self.work, place, theirs))
            self.process.start()
            theirs.close()
            self.left = CASES_A_PROCESS
        self.case, self.begun, self.left = case, time.monotonic(), self.left - 1
        self.pipe.send(case)

    def ended(self) -> Ended | None:
        """How its case ended; None where it is not over."""
        assert self.case is not None
        case, seconds = self.case, time.monotonic() - self.begun
        answer, over = None, seconds > SECONDS
        if self.pipe.poll():
            with contextlib.suppress(EOFError, ConnectionResetError):
                answer = self.pipe.recv()
            over = over or answer is None
        if answer is None and not over:
            return None
        self.case = None
        if answer is None:
            hung = seconds > SECONDS
            self.process.kill()
            self.process.join()
            self.left = 0
            how = f"it ended with {self.process.exitcode}"
            answer = Ended(case, "hang" if hung else "crash", "", "" if hung else how, seconds)
        return answer

    def end(self) -> None:
        if hasattr(self, "process") and self.process.is_alive():
            with contextlib.suppress(OSError):
                self.pipe.send(None)
            self.process.join(SECONDS)
            self.process.kill()


def run_cases(work: Path, cases: Iterator[Case], workers: int) -> Iterator[Ended]:
    """How every case ended, as they end."""
    processes = [_Process(work, number) for number in range(workers)]
    waiting, more = list(processes), True
    try:
        while more or len(waiting) < workers:
            while more and waiting:
                case = next(cases, None)
                more = case is not None
                if case is not None:
                    waiting.pop().give(case)
            busy = [process for process in processes if process.case is not None]
            multiprocessing.connection.wait([process.pipe for process in busy], 1.0)
            for process in busy:
                if (ended := process.ended()) is not None:
                    waiting.append(process)
                    yield ended
    finally:
        for process in processes:
            process.end()


@functools.cache
def import_everything() -> None:
    """What the targets need, before there are processes: it takes seconds."""
    warnings.simplefilter("ignore")  # of Megatron's, about what is not installed
    logging.disable(logging.WARNING)
    import datasets  # noqa: F401
    import torch
    import transformers.models.auto.modeling_auto
    from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM  # noqa: F401

    import megatron_tsft.checkpoint.verify
    import megatron_tsft.commands.convert
    import megatron_tsft.commands.inspect_cache
    import megatron_tsft.commands.prepare
    import megatron_tsft.model.metrics_file  # noqa: F401

    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
