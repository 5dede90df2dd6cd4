"""The ranks of a test: forked from this process (it has imported everything), in one gloo group,
each ended by id."""

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

FORK = multiprocessing.get_context("fork")
INHERITED: dict[str, Any] = {}


def run_ranks(
    world: int, function: Callable[..., Any], *args: Any, timeout: float = 600, group: bool = True
) -> list:
    """`function(rank, *args)` in `world` forked processes; their results in rank order.

    With `group` the ranks share torch's default gloo group. Tensors in `args` are inherited,
    results are pickled. Forks cost milliseconds, so import the heavy modules before the first call.

    Raises:
        AssertionError: a rank raised, died or was not done in `timeout` seconds; the message holds
            its traceback.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        ranks = [
            FORK.Process(target=_rank, args=(folder, rank, world, group, function, args))
            for rank in range(world)
        ]
        try:
            with (
                warnings.catch_warnings()
            ):  # Python warns that the parent has threads; the children use none of them
                warnings.simplefilter("ignore", DeprecationWarning)
                for rank in ranks:
                    rank.start()
            late = _wait(ranks, timeout)
        finally:
            for rank in ranks:
                _end(rank)
        files = {i: folder / f"error{i}" for i in range(world)}
        errors = [f"rank {i}: {file.read_text()}" for i, file in files.items() if file.exists()]
        assert not errors, "\n".join(errors)
        assert not late, f"ranks {late} were not done after {timeout} s"
        codes = [rank.exitcode for rank in ranks]
        assert codes == [0] * world, f"exit codes {codes}"
        return [torch.load(folder / f"result{i}", weights_only=False) for i in range(world)]


def _rank(
    folder: Path, rank: int, world: int, group: bool, function: Callable[..., Any], args: tuple
) -> None:
    # so that _end finds what this rank starts, such as the helpers of Megatron's checkpoint writer
    os.setsid()
    # a group that the parent has left in Megatron's globals: its destructor would wait here for
    # threads of the parent
    if "megatron.core.parallel_state" in sys.modules:
        INHERITED.update(vars(sys.modules["megatron.core.parallel_state"]))
    try:
        torch.set_num_threads(1)
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world)
        )
        if group:
            store = dist.FileStore(str(folder / "store"), world)  # pyright: ignore[reportPrivateImportUsage]
            dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
        torch.save(function(rank, *args), folder / f"result{rank}")
        if group:
            dist.barrier()  # nobody leaves while another still receives from it
            dist.destroy_process_group()
    except BaseException:
        (folder / f"error{rank}").write_text(traceback.format_exc())
        os._exit(1)  # no clean-up: it could wait for a peer


def _end(rank: Any) -> None:
    """End one rank, if it runs, and whatever it has left running."""
    if rank.pid is None:
        return
    if rank.is_alive():
        rank.kill()
    rank.join()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(rank.pid, signal.SIGKILL)


def _wait(ranks: list[Any], timeout: float) -> list[int]:
    """Until every rank has ended, or one has failed (its peers may wait for it for ever); who is
    still alive then."""
    deadline = time.monotonic() + timeout
    alive = dict(enumerate(ranks))
    while alive and time.monotonic() < deadline:
        multiprocessing.connection.wait(
            [r.sentinel for r in alive.values()], deadline - time.monotonic()
        )
        ended = {i: r for i, r in alive.items() if not r.is_alive()}
        if any(r.exitcode for r in ended.values()):
            return []
        alive = {i: r for i, r in alive.items() if i not in ended}
    return list(alive)
