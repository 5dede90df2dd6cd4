#!/usr/bin/env python3
"""Count the bytes that the Triton kernels load and store per local logit, forward and backward.

Triton's interpreter runs the kernels' own program on the CPU, block by block, so the count is
exact: it is what the program asks of memory.
"""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"  # decided when a kernel is defined
os.environ["TSFT_BACKEND"] = "triton"

from triton.runtime import interpreter

from megatron_tsft import q_target_cross_entropy
from megatron_tsft.errors import UserError
from shared import command
from shared.inputs import CHOICES, DTYPES, Section, Shape, make_case

EXAMPLE = """example:
  benchmarks/count_traffic.py
  benchmarks/count_traffic.py --dtype fp32 --columns 18992 --objectives sft target-sft-dense
  benchmarks/count_traffic.py --json    # {"sft": 6.0, ...}, for other programs
"""
FLOOR = {
    "none": 3,
    "dense": 5,
    "topk": 3,
}  # reads and writes of a whole tensor that no implementation can avoid


@dataclass
class Traffic:
    """Bytes so far."""

    loaded: int = 0
    stored: int = 0


@dataclass(frozen=True)
class Count:
    """Bytes per logit of one objective."""

    forward_loads: float
    forward_stores: float
    backward_loads: float
    backward_stores: float

    @property
    def total(self) -> float:
        return self.forward_loads + self.forward_stores + self.backward_loads + self.backward_stores


@contextmanager
def counting() -> Iterator[Traffic]:
    """Every load and store of every kernel that the interpreter runs meanwhile; masked lanes move
    nothing."""
    builder: Any = interpreter.InterpreterBuilder
    seen = Traffic()
    load, store = builder.create_masked_load, builder.create_masked_store

    def size(pointers: Any, mask: Any) -> int:
        return int(mask.data.sum()) * pointers.get_element_ty().primitive_bitwidth // 8

    def counted_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        seen.loaded += size(pointers, mask)
        return load(self, pointers, mask, *rest)

    def counted_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        seen.stored += size(pointers, mask)
        return store(self, pointers, value, mask, *rest)

    # unmasked loads and stores go through the masked ones (triton/runtime/interpreter.py)
    builder.create_masked_load, builder.create_masked_store = counted_load, counted_store
    try:
        yield seen
    finally:
        builder.create_masked_load, builder.create_masked_store = load, store


def count(key: str, columns: int, tokens: int, dtype: str, inplace: bool = False) -> Count:
    """Bytes per logit of one of the benchmark's objectives, forward and backward.

    Args:
        key: a name in shared.inputs.CHOICES.
        columns: of the shard.
        tokens: all of them supervised; every token moves the same.
        dtype: "bf16" or "fp32".
        inplace: the gradient is written over the logits.
    """
    section = Section(Shape(tokens, columns), dtype, "logits", 0, 1, 1234, "cpu", (key,))
    case, choice = make_case(section), CHOICES[key]
    logits = case.leaves[0] * 1  # no leaf, so that it may be written over
    teacher = {"none": None, "dense": case.dense, "topk": case.topk}[choice.teacher]
    with counting() as forward:
        out = q_target_cross_entropy(
            logits, case.labels, choice.objective(), teacher=teacher, inplace=inplace
        )
    with counting() as backward:
        out.loss.backward(case.upstream)
    parts = (forward.loaded, forward.stored, backward.loaded, backward.stored)
    return Count(*(part / (tokens * columns) for part in parts))


def bytes_per_logit(key: str, columns: int = 131072, tokens: int = 2, dtype: str = "bf16") -> float:
    """Forward and backward together."""
    return count(key, columns, tokens, dtype).total


@command.says_errors
def main(argv: list[str] | None = None) -> int:
    """Print a table, or JSON."""
    parser = command.parser(__doc__, EXAMPLE)
    parser.add_argument(
        "--objectives", nargs="+", default=list(CHOICES), metavar="NAME", help=", ".join(CHOICES)
    )
    parser.add_argument(
        "--columns", type=int, default=131072, help="of the vocabulary shard (default: 131072)"
    )
    parser.add_argument(
        "--tokens", type=int, default=2, help="how many are run (default: 2; each moves the same)"
    )
    parser.add_argument(
        "--dtype", default="bf16", choices=DTYPES, help="of logits, teacher and gradient"
    )
    parser.add_argument("--inplace", action="store_true", help="write the gradient over the logits")
    parser.add_argument("--json", action="store_true", help="print the totals as JSON")
    args = parser.parse_args(argv)
    unknown = [name for name in args.objectives if name not in CHOICES]
    if unknown:
        raise UserError(f"--objectives {' '.join(unknown)}: valid: {', '.join(CHOICES)}")
    if args.columns < 1 or args.tokens < 1:
        raise UserError(f"--columns {args.columns} --tokens {args.tokens}: both must be at least 1")
    counts = {
        key: count(key, args.columns, args.tokens, args.dtype, args.inplace)
        for key in args.objectives
    }
    if args.json:
        print(json.dumps({key: round(value.total, 4) for key, value in counts.items()}))
        return 0
    item = DTYPES[args.dtype].itemsize
    print(
        f"bytes per local logit, {args.dtype}, {args.columns} columns; floor: what no"
        " implementation can avoid"
    )
    titles = " ".join(f"{title:>9}" for title in ("fwd load", "fwd store", "bwd load", "bwd store"))
    print(f"{'objective':18} {titles} {'total':>8} {'floor':>6}")
    for key, value in counts.items():
        parts = (
            value.forward_loads,
            value.forward_stores,
            value.backward_loads,
            value.backward_stores,
            value.total,
        )
        numbers = " ".join(f"{part:9.4f}" for part in parts[:4])
        print(f"{key:18} {numbers} {value.total:8.4f} {FLOOR[CHOICES[key].teacher] * item:6}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
