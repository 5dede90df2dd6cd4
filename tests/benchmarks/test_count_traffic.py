"""The kernels move what tensor parallelism allows: two reads and a write, four and a write with a
dense teacher."""

import json
import subprocess
import sys
from typing import Any

import pytest

from tests.fresh import REPOSITORY

TOOL = REPOSITORY / "benchmarks" / "count_traffic.py"
# bytes per local logit in bf16 (the floor is 6, with a
# dense teacher 10); what is above it are numbers per token
LIMITS = {
    "sft": 6.1,
    "dft": 6.1,
    "gem": 6.1,
    "target-sft-eta0": 6.1,
    "target-sft-dense": 10.1,
    "target-sft-topk": 6.2,
}


def counted(*flags: str) -> dict[str, Any]:
    command = [
        sys.executable,
        str(TOOL),
        "--json",
        *flags,
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    "flags", ["", "--columns 18992 --inplace"], ids=["whole-vocabulary", "shard-in-place"]
)
def test_the_kernels_move_the_floor(flags: str) -> None:
    bytes_moved = counted(*flags.split())
    assert bytes_moved.keys() == LIMITS.keys()
    for name, limit in LIMITS.items():
        floor = 10 if name == "target-sft-dense" else 6
        assert floor <= bytes_moved[name] <= limit, name


def test_the_count_sees_every_byte() -> None:
    """fp32 moves twice as much as bf16."""
    bytes_moved = counted(
        "--dtype", "fp32", "--columns", "4096", "--objectives", "sft", "target-sft-dense"
    )
    assert 12 <= bytes_moved["sft"] < 12.2 and 20 <= bytes_moved["target-sft-dense"] < 20.2


def test_unknown_objective() -> None:
    command = [
        sys.executable,
        str(TOOL),
        "--objectives",
        "sfd",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: --objectives sfd: valid: sft")
