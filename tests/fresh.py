"""A function of a test file in a new interpreter: for what depends on who imported Megatron first,
or replaced what."""

import contextlib
import inspect
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
PATHS = (REPOSITORY, REPOSITORY / "benchmarks")  # as pytest's own, in pyproject.toml
PROGRAM = """
import importlib, json, sys
module, function, arguments, result = sys.argv[1:]
value = getattr(importlib.import_module(module), function)(*json.loads(arguments))
with open(result, "w") as file:
    json.dump(value, file)
"""


def fresh(function: Callable[..., Any], *args: Any, timeout: float = 300) -> Any:
    """`function(*args)` in a new interpreter; arguments and result travel as JSON (tuples arrive as
    lists).

    Raises:
        AssertionError: it raised, died or was not done in `timeout` seconds; the message holds what
            it printed.
    """
    module = ".".join(Path(inspect.getfile(function)).relative_to(REPOSITORY).with_suffix("").parts)
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, PATHS)),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    with tempfile.TemporaryDirectory() as scratch:
        result, output = Path(scratch) / "result.json", Path(scratch) / "output"
        line = [
            sys.executable,
            "-c",
            PROGRAM,
            module,
            function.__name__,
            json.dumps(args),
            str(result),
        ]
        with output.open(
            "w"
        ) as file:  # a file: what the process leaves running would keep a pipe open
            process = subprocess.Popen(
                line, stdout=file, stderr=file, env=environment, start_new_session=True
            )
            try:
                code = process.wait(timeout)
            except subprocess.TimeoutExpired:
                code = f"no end after {timeout} s"
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        assert code == 0, f"{function.__name__}: {code}\n{output.read_text(errors='replace')}"
        return json.loads(result.read_text())
