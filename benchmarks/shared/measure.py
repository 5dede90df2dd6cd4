"""One measurement, in processes of its own: agreement with ours, time of forward and backward, peak
of extra memory.

Memory on CUDA is the allocator's own high-water mark. On a CPU it is the kernel's: 5 written to
/proc/self/clear_refs sets VmHWM of /proc/self/status back to what is resident now. For that glibc
is told to map every larger block by itself and to give it back at once, which costs time, so time
is taken in another process with the allocator as it is. Pages of files (code that is loaded on
first use) are left out.
"""

import ctypes
import gc
import multiprocessing
import multiprocessing.connection
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shared.inputs import DTYPES, Case, Section, make_case
from shared.peers import PEERS, Peer, Step, group_of, matmul_ours, ours

GUARD_TOKENS = 8
MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1  # glibc's mallopt
CACHE_BYTES = 256 << 20  # more than any GPU's L2


@dataclass(frozen=True)
class Settings:
    """What every measurement of a run has in common."""

    threads: int
    repeat: int
    timeout: float  # seconds, of one measurement


@dataclass(frozen=True)
class Task:
    """One row of a section, or the copy kernel where `peer` is empty; `what` is measured of it."""

    key: str
    peer: str
    what: tuple[str, ...] = ("difference", "memory", "time")


# ---- in the measuring process
# ----------------------------------------------------------------------------------------


def status_bytes(field: str) -> int:
    """One line of /proc/self/status, such as VmHWM."""
    text = Path("/proc/self/status").read_text()
    return (
        next(int(line.split()[1]) for line in text.splitlines() if line.startswith(field + ":"))
        << 10
    )


def extra_memory(step: Step, device: str) -> tuple[int, tuple[Tensor, ...]]:
    """Bytes at the highest moment of one step beyond those before it, and its gradients."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        found = step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before, found
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before, files = status_bytes("VmRSS"), status_bytes("RssFile")
    found = step()
    return max(0, status_bytes("VmHWM") - before - (status_bytes("RssFile") - files)), found


def strict_allocator() -> None:
    """Every block of 64 KiB or more is its own mapping, so that freed memory is not resident
    memory."""
    libc = ctypes.CDLL(None)
    for option, value in ((MMAP_THRESHOLD, 64 << 10), (TRIM_THRESHOLD, 0)):
        if libc.mallopt(option, value) != 1:
            raise RuntimeError(
                f"mallopt({option}, {value}) failed: memory cannot be measured with this C library"
            )


def new_bytes(grads: tuple[Tensor, ...], leaves: tuple[Tensor, ...]) -> int:
    """Of the gradients' buffers, without those that are the inputs' own."""
    inputs = {leaf.untyped_storage().data_ptr() for leaf in leaves}
    buffers = {grad.untyped_storage().data_ptr(): grad.untyped_storage().nbytes() for grad in grads}
    return sum(size for address, size in buffers.items() if address not in inputs)


def largest_difference(peer: Peer, case: Case) -> float:
    """Between this peer's gradients and ours (torch, not in place) on the first tokens."""
    small, same = case.first(GUARD_TOKENS), case.first(GUARD_TOKENS)
    reference = ours("torch") if peer.part == "logits" else matmul_ours(False)
    if "teacher-head" in peer.name:
        reference = matmul_ours(True)
    pairs = zip(peer.build(small)(), reference(same)(), strict=True)
    return max((a.double() - b.double()).abs().max().item() for a, b in pairs)


def timed(step: Step, refresh: Any, settings: Settings, device: str) -> list[float]:
    """Milliseconds of each repeat, after a warm-up; `refresh` runs before each and is not timed."""
    cache = torch.empty(CACHE_BYTES, dtype=torch.int8, device=device) if device == "cuda" else None
    times = []
    warm_up = 3 if device == "cuda" else 1  # kernels may be tuned in the second call
    for number in range(-warm_up, settings.repeat):
        refresh()
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
        if cache is not None:
            cache.zero_()
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize()
            begin.record()
            step()
            end.record()
            torch.cuda.synchronize()
            elapsed = begin.elapsed_time(end)
        else:
            start = time.perf_counter()
            found = step()
            elapsed = (time.perf_counter() - start) * 1e3
            del found
        if number >= 0:
            times.append(elapsed)
    return times


def copy_times(section: Section, settings: Settings) -> list[float]:
    """Milliseconds of copying a buffer of the logits' size, which moves twice its bytes."""
    elements = section.shape.tokens * section.shape.columns
    source = torch.zeros(elements, dtype=DTYPES[section.dtype], device=section.device)
    target = torch.zeros_like(source)
    return timed(lambda: (target.copy_(source),), lambda: None, settings, section.device)


def measure(task: Task, case: Case, section: Section, settings: Settings) -> dict[str, Any]:
    """What the task asks for, as numbers."""
    if not task.peer:
        return {"times_ms": copy_times(section, settings)}
    peer, case = PEERS[task.peer], replace(case, key=task.key)
    if not peer.per_token:
        case = replace(case, upstream=torch.ones_like(case.upstream))
    if peer.destroys:
        kept = case.leaves[0].detach()
        leaf = kept.clone().requires_grad_()
        case = replace(case, leaves=(leaf,))

        def refresh() -> None:
            with torch.no_grad():
                leaf.copy_(kept)
    else:

        def refresh() -> None: ...

    if task.what == ("memory",):
        strict_allocator()
    result: dict[str, Any] = {}
    result["difference"] = largest_difference(peer, case)  # always: it loads code, too
    if peer.compiles:
        # what it learnt from the few tokens would make it compile for any number of them
        torch._dynamo.reset()
    step = peer.build(case)
    if "memory" in task.what:
        if peer.compiles:
            step()
            refresh()
        peak, grads = extra_memory(step, section.device)
        result.update(peak_bytes=peak, gradient_bytes=new_bytes(grads, case.leaves))
        del grads
    if "time" in task.what:
        result["times_ms"] = timed(step, refresh, settings, section.device)
    return result


def work(
    rank: int,
    folder: str,
    tasks: Sequence[Task],
    section: Section,
    settings: Settings,
    case: Case | None,
    pipe: Any,
) -> None:
    """The body of a measuring process: a result, or why there is none, through the pipe for each
    task."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process
    debug = os.environ.get("TSFT_DEBUG", "0") not in ("", "0")
    if not debug:  # what packages say while they are imported and compiled would bury the tables
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # no helper processes
    torch.set_num_threads(settings.threads)
    try:
        if section.device == "cuda":
            torch.cuda.set_device(rank)
        if section.world > 1:
            path = str(Path(folder) / "store")
            store = torch.distributed.FileStore(path, section.world)  # pyright: ignore[reportPrivateImportUsage]
            backend = "nccl" if section.device == "cuda" else "gloo"
            torch.distributed.init_process_group(
                backend, store=store, rank=rank, world_size=section.world
            )
        case = case or make_case(section, rank)
        case = replace(case, group=group_of(case) if section.world > 1 else None)
        broken = None
    except Exception as error:
        broken = error
    for task in tasks:
        try:
            if broken is not None:
                raise broken
            assert case is not None
            if section.device == "cuda":
                gc.collect()
                # one that ran out of memory must not be the end of the next
                torch.cuda.empty_cache()
            pipe.send(measure(task, case, section, settings))
        except Exception as error:
            if debug:
                traceback.print_exc()
            pipe.send({"failed": one_line(error)})
    pipe.close()
    os._exit(0)  # no clean-up: it could wait for a rank that has failed


def one_line(error: BaseException) -> str:
    """The first line of an error that says something, cut to fit a table."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:160]


# ---- in the parent
# -------------------------------------------------------------------------------------------------


def run(
    tasks: Sequence[Task], section: Section, settings: Settings, case: Case | None
) -> Iterator[dict[str, Any]]:
    """The result of each task; `{"failed": why}` where there is none. One process a rank does them
    all while it lives.

    `case` is inherited by forks on a CPU; else every process makes its own.
    """
    left = list(tasks)
    while left:
        with tempfile.TemporaryDirectory() as folder:
            ranks, pipes = _start(left, section, settings, case, folder)
            try:
                while left:
                    result = _collect(pipes, ranks, settings.timeout)
                    left.pop(0)
                    yield result
                    if "failed" in result and (section.world > 1 or not ranks[0].is_alive()):
                        break  # the rest starts again, without what has failed
            finally:
                for process in ranks:
                    process.kill()
                    process.join()


def _start(
    left: list[Task], section: Section, settings: Settings, case: Case | None, folder: str
) -> Any:
    context: Any = multiprocessing.get_context(
        "fork" if section.device == "cpu" else "spawn"
    )  # CUDA survives no fork
    ranks, pipes = [], []
    for rank in range(section.world):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(
            target=work, args=(rank, folder, left, section, settings, case, sender), daemon=True
        )
        process.start()
        sender.close()  # here, so that the end of the process is the end of the pipe
        ranks.append(process)
        pipes.append(receiver)
    return ranks, pipes


def _collect(pipes: list[Any], ranks: list[Any], timeout: float) -> dict[str, Any]:
    """One task's results of all ranks as one: the slowest time of each repeat, the largest of
    everything else."""
    results, deadline = [], time.monotonic() + timeout
    waiting: dict[Any, Any] = dict(zip(pipes, ranks, strict=True))
    while waiting:
        ready: Any = multiprocessing.connection.wait(
            list(waiting), max(0.0, deadline - time.monotonic())
        )
        if not ready:
            for process in ranks:
                process.kill()
                process.join()
            return {"failed": f"not done after {timeout:g} s"}
        for pipe in ready:
            process = waiting.pop(pipe)
            try:
                result = pipe.recv()
            except EOFError:
                process.join()
                result = {
                    "failed": f"its process ended with exit code {process.exitcode} (TSFT_DEBUG=1"
                    " shows its messages)"
                }
            if "failed" in result:
                return result
            results.append(result)
    merged: dict[str, Any] = {
        name: max(result[name] for result in results) for name in results[0] if name != "times_ms"
    }
    if "times_ms" in results[0]:
        merged["times_ms"] = [
            max(times) for times in zip(*(result["times_ms"] for result in results), strict=True)
        ]
    return merged
