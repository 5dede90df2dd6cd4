"""Training runs for the tests: a tiny Llama, prepared data, and `train`, which runs Megatron's real loop on gloo."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Run:
    """What a training command left: exit status of each rank, what rank 0 said, the rows of metrics.jsonl."""

    codes: list[int]
    logs: list[str]
    save: Path

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Training rows by step."""
        return [row for row in self._all if "split" not in row]

    @property
    def heldout(self) -> list[dict[str, Any]]:
        return [row for row in self._all if row.get("split") == "heldout"]

    @property
    def _all(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.save / "metrics.jsonl").read_text().splitlines()]

    @property
    def error(self) -> str:
        """The line that starts with "error:"; empty without one."""
        return next((line for line in self.logs[0].splitlines() if line.startswith("error:")), "")


class Server:
    """tests/training/rank_server.py, started once a session."""

    def __init__(self) -> None:
        environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        program = Path(__file__).with_name("rank_server.py")
        self.process = subprocess.Popen(
            [sys.executable, str(program)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline().strip() == "ready"

    def run(self, world: int, argv: list[str], log: Path, timeout: float) -> list[int]:
        assert self.process.stdin is not None and self.process.stdout is not None
        case = {"world": world, "argv": argv, "log": str(log), "timeout": timeout}
        self.process.stdin.write(json.dumps(case) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())["codes"]

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()
