"""A function of a test file in a new interpreter: for what depends on who imported Megatron first, or replaced what."""

import inspect
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
PROGRAM = """
import importlib, json, sys
module, function, arguments, result = sys.argv[1:]
value = getattr(importlib.import_module(module), function)(*json.loads(arguments))
with open(result, "w") as file:
    json.dump(value, file)
"""


def fresh(function: Callable[..., Any], *args: Any, timeout: float = 120) -> Any:
    """`function(*args)` in a new interpreter; arguments and result travel as JSON (tuples arrive as lists).

    Raises:
        AssertionError: it raised, died or was not done in `timeout` seconds; the message holds what it printed.
    """
    module = ".".join(Path(inspect.getfile(function)).relative_to(REPOSITORY).with_suffix("").parts)
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with tempfile.TemporaryDirectory() as scratch:
        result = Path(scratch) / "result.json"
        line = [sys.executable, "-c", PROGRAM, module, function.__name__, json.dumps(args), str(result)]
        try:
            done = subprocess.run(line, capture_output=True, text=True, env=environment, timeout=timeout)
        except subprocess.TimeoutExpired as error:
            raise AssertionError(f"{function.__name__} was not done in {timeout} s: {error.stderr}") from error
        assert done.returncode == 0, f"{function.__name__} ended with {done.returncode}:\n{done.stdout}{done.stderr}"
        return json.loads(result.read_text())
