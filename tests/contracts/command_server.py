"""Runs Python commands for test_documented_commands.py: what all of them import is imported once,
and each command is a fork.

Started with the path of a Unix socket. A client (`client`, below, which stands in for `python` and
`torchrun` on the PATH of a documented command) sends its name, words, folder and environment with
its three standard files, and gets the exit status. `torchrun` and `python -m` one of TORCHRUN
have their words parsed by torch's own parser and their ranks forked, on one machine.
"""

import argparse
import contextlib
import json
import multiprocessing.util
import os
import runpy
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

# words that a test appends to every training command, and (by script) to benchmarks
TRAINING, SCRIPTS = "DOCUMENTED_TRAINING", "DOCUMENTED_SCRIPTS"
PARSES = "DOCUMENTED_PARSES"  # set: the scripts end when their words are parsed
ENTRY = "megatron_tsft.training.pretrain_gpt"
TORCHRUN = ("torch.distributed.run", "megatron_tsft.commands.torchrun")
CLIENT = """#!/bin/sh
exec {python} -IS {server} --client {socket} "$(basename "$0")" "$@"
"""


def client(address: str, name: str, words: list[str]) -> int:
    """Hand a command to the server; its exit status."""
    case = {"name": name, "words": words, "folder": os.getcwd(), "environment": dict(os.environ)}
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(address)
        socket.send_fds(sock, [b"x"], [0, 1, 2])
        sock.sendall(json.dumps(case).encode() + b"\n")
        return int(sock.makefile().readline() or 1)


def ended(work: Callable[[], Any]) -> int:
    """The exit status that Python would end with after `work()`."""
    try:
        work()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    # what Python does at exit
    multiprocessing.util._exit_function()  # pyright: ignore[reportAttributeAccessIssue]
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.flush()
        sys.stderr.flush()
    return code


def only_parse(parser: argparse.ArgumentParser, *args: Any, **keywords: Any) -> NoReturn:
    """`parser.parse_args(...)`, and then no more."""
    _, unknown = parser.parse_known_args(*args, **keywords)
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    sys.exit(0)


def run_words(words: list[str]) -> None:
    """`python words...`, in this process."""
    if words[:1] == ["-m"]:
        if words[1] in TORCHRUN:
            run_ranks(words[2:])
        if words[1] == "pytest":  # rewrites what it imports, so it imports for itself
            sys.exit(subprocess.run([sys.executable, *words]).returncode)
        sys.argv, sys.path[0] = words[1:], os.getcwd()
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        return
    script = Path(words[0]).resolve()
    if PARSES in os.environ:
        setattr(argparse.ArgumentParser, "parse_args", only_parse)  # noqa: B010
    more = json.loads(os.environ.get(SCRIPTS, "{}")).get(f"{script.parent.name}/{script.name}", "")
    sys.argv, sys.path[0] = [words[0], *words[1:], *more.split()], str(script.parent)
    runpy.run_path(str(script), run_name="__main__")


def run_ranks(words: list[str]) -> None:
    """What torchrun does on this node; of a training run that only checks, rank 0 alone. Exits."""
    from torch.distributed.run import get_args_parser

    from tests.ports import free_port

    options = get_args_parser().parse_args(words)
    node = int(options.nproc_per_node)
    world = node * int(str(options.nnodes).split(":")[-1])
    program = ["-m", options.training_script] if options.module else [options.training_script]
    program += options.training_script_args
    if options.training_script == ENTRY:
        program += os.environ.get(TRAINING, "").split()
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    os.environ |= {"WORLD_SIZE": str(world)}
    alive = set()
    for rank in range(1 if "--tsft-check" in program else node):
        pid = os.fork()
        if not pid:
            os.environ |= {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "LOCAL_WORLD_SIZE": str(node),
            }
            os._exit(ended(lambda: run_words(program)))
        alive.add(pid)
    worst = 0
    while alive:
        pid, status = os.wait()
        alive.discard(pid)
        worst = worst or os.waitstatus_to_exitcode(status)
        for left in alive if worst else ():
            os.kill(left, signal.SIGKILL)  # they would wait for the one that failed
    sys.exit(worst)


def answer(connection: socket.socket) -> None:
    """One command, in a fork: its files, folder and environment are the client's."""
    _, files, _, _ = socket.recv_fds(connection, 1, 3)
    case = json.loads(connection.makefile().readline())
    for number, file in enumerate(files):
        os.dup2(file, number)
    os.chdir(case["folder"])
    os.environ.clear()
    os.environ |= case["environment"]
    words = case["words"]
    if case["name"] == "torchrun":
        words = ["-m", "torch.distributed.run", *words]
    code = ended(lambda: run_words(words))
    with contextlib.suppress(OSError):
        connection.sendall(f"{code}\n".encode())
    os._exit(code)


def serve(address: str) -> None:
    """Import, say "ready", answer until the parent ends this process, or ends itself."""
    parent = os.getppid()
    import torch

    from megatron_tsft.cpu import install

    torch.set_num_threads(1)
    install()
    import datasets  # noqa: F401

    from tests.training.rank_server import import_what_ranks_import

    import_what_ranks_import()
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(address)
        sock.listen(16)
        sock.settimeout(5)
        print("ready", flush=True)
        while True:
            try:
                connection, _ = sock.accept()
            except TimeoutError:
                if os.getppid() != parent:
                    os.killpg(0, signal.SIGKILL)  # the group is this server's own, forks included
                continue
            if not os.fork():
                answer(connection)
            connection.close()
            with contextlib.suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass


if __name__ == "__main__":
    if sys.argv[1] == "--client":
        sys.exit(client(sys.argv[2], sys.argv[3], sys.argv[4:]))
    serve(sys.argv[1])
