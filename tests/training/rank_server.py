"""Runs training commands for the tests: Megatron is imported once, on the CPU layer, and each
case's ranks are forked.

Reads one JSON object a line: {"world", "argv", "log", "timeout", "tool"}, where tool is a script
that runs in place of training, or ""; answers with {"codes": [exit status of each rank]}.
A process of its own, because the CPU layer changes torch for good.
"""

import importlib
import json
import multiprocessing.util
import os
import runpy
import signal
import sys
import time
import traceback
from pathlib import Path

from megatron_tsft.plan import teachers
from tests.ports import free_port


def start_rank(rank: int, world: int, port: int, argv: list[str], log: Path, tool: str) -> int:
    """Fork one rank; its output goes to <log>.<rank>. Returns its process id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        with Path(f"{log}.{rank}").open("wb", buffering=0) as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        address = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "WORLD_SIZE": str(world),
            "RANK": str(rank),
        }
        os.environ.update(address, LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world))
        if tool:
            code = runpy.run_path(tool)["main"](argv)
        else:
            from megatron_tsft.training.pretrain_gpt import main

            code = main(argv)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        # what Python does at exit: ends the processes that the rank started
        multiprocessing.util._exit_function()  # pyright: ignore[reportAttributeAccessIssue]
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run_case(world: int, argv: list[str], log: str, timeout: float, tool: str = "") -> list[int]:
    """Start the ranks and wait; when one fails or time is up, the others are killed, by their
    ids."""
    port = free_port()
    alive = {start_rank(rank, world, port, argv, Path(log), tool): rank for rank in range(world)}
    codes = [-1] * world
    deadline = time.monotonic() + timeout
    while alive:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid in alive:
            codes[alive.pop(pid)] = os.waitstatus_to_exitcode(status)
        if any(code > 0 for code in codes):
            deadline = min(
                deadline, time.monotonic() + 1
            )  # as torchrun does: its peers may wait for it
        if time.monotonic() > deadline:
            for left in alive:
                os.kill(left, signal.SIGKILL)
                os.waitpid(left, 0)
            break
        if not pid:
            time.sleep(0.02)
    return codes


# what a rank imports one way or another; pyarrow's tables look for pandas
IMPORTED = (
    "megatron.core.tokenizers.text.libraries.huggingface_tokenizer",
    "megatron_tsft.training.megatron_teacher",
    "megatron_tsft.training.run",
    *(f"{teachers.__name__}.{name}" for name in teachers.NAMES),
    "pandas",
    "pyarrow.compute",
    "transformers.models.auto.tokenization_auto",
)


def import_what_ranks_import() -> None:
    """Before the forks: a rank that imports all of it for itself needs two seconds more."""
    for name in IMPORTED:
        importlib.import_module(name)


def serve() -> None:
    """Import, say "ready", answer until the input ends."""
    answers = os.fdopen(os.dup(1), "w")  # imports and cases may print
    os.dup2(2, 1)
    import torch

    from megatron_tsft.cpu import install

    torch.set_num_threads(1)
    install()
    import_what_ranks_import()

    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps({"codes": run_case(**json.loads(line))}), file=answers, flush=True)


if __name__ == "__main__":
    serve()
