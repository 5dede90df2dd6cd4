#!/usr/bin/env python3
"""What checksums cost: a save with its list over one without, and a full verification over reading
the same files with `cat`.

torch's own writer of distributed checkpoints saves random tensors, as Megatron's does; the list is
written after it, on one thread, though a run writes it beside the training. All files are in the
page cache while they are read, so that the disk is no part of the second ratio.
"""

import argparse
import functools
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.distributed.checkpoint.state_dict_saver import save

from megatron_tsft.checkpoint.manifest import check_files, data_files, write_list
from shared import command

EXAMPLE = """example:
  benchmarks/checksums.py --gigabytes 2.2 --output runs/checksums
"""
TENSORS = 64


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; see EXAMPLE."""
    parser = command.parser(__doc__, EXAMPLE)
    parser.add_argument("--gigabytes", type=float, default=2.2, metavar="N", help="(default: 2.2)")
    parser.add_argument("--repeat", type=int, default=3, metavar="N", help="(default: 3)")
    parser.add_argument(
        "--output", default="runs/checksums", metavar="DIR", help="(default: runs/checksums)"
    )
    return parser.parse_args(argv)


def seconds(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def main(argv: list[str] | None = None) -> int:
    """Measure and print one JSON object."""
    args = parse(argv)
    size = int(args.gigabytes * 1e9 / 4 / TENSORS)
    tensors = {f"w{i}": torch.rand(size) for i in range(TENSORS)}
    folder = Path(args.output)
    times: dict[str, list[float]] = {"save": [], "list": [], "verify": [], "cat": []}
    for _ in range(args.repeat):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        times["save"].append(seconds(lambda: save(tensors, checkpoint_id=str(folder))))
        times["list"].append(seconds(lambda: write_list(folder, data_files(folder), 0)))
        files = [str(folder / name) for name in data_files(folder)]
        with open("/dev/null", "wb") as null:
            read = functools.partial(subprocess.run, ["cat", *files], stdout=null, check=True)
            read()  # into the page cache
            times["cat"].append(seconds(read))
        times["verify"].append(seconds(lambda: check_files(folder)))
    written = sum(path.stat().st_size for path in folder.iterdir())
    shutil.rmtree(folder)
    middle = {name: statistics.median(values) for name, values in times.items()}
    result = {
        "gigabytes": round(written / 1e9, 3),
        "save with list / save": round((middle["save"] + middle["list"]) / middle["save"], 3),
        "verification / cat, bytes a second": round(middle["cat"] / middle["verify"], 3),
        "seconds": {name: round(value, 3) for name, value in middle.items()},
    }
    print(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
