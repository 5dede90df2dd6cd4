#!/usr/bin/env python3
"""How fast and in how much memory a model is converted, beside a plain copy of the same files in
the same run."""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_tsft.errors import UserError
from shared import command

EXAMPLE = """example:
  benchmarks/convert.py --output runs/convert --gigabytes 8

Makes a synthetic bf16 Llama under DIR (its embedding is an eighth of it), needs three times its
size on the disk, and removes what it made.
"""
VOCABULARY, SHARD = 131072, 2.5e9  # bytes of a safetensors file
CONVERT = str(Path(__file__).resolve().parents[1] / "tools" / "convert_checkpoint.py")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; see EXAMPLE."""
    parser = command.parser(__doc__, EXAMPLE)
    parser.add_argument(
        "--output", required=True, metavar="DIR", help="a folder that does not exist yet"
    )
    parser.add_argument(
        "--gigabytes", type=float, default=8.0, help="size of the model (default: 8)"
    )
    return parser.parse_args(argv)


def write_model(folder: Path, gigabytes: float) -> tuple[int, int]:
    """A bf16 Llama in several files, never in memory as a whole; (its bytes, those of its largest
    tensor)."""
    import torch
    from transformers import LlamaConfig

    from megatron_tsft.checkpoint.families.llama import FAMILY
    from megatron_tsft.checkpoint.mapping import Shape, sizes
    from megatron_tsft.checkpoint.safetensors_stream import SafetensorsStream, TensorSpec

    hidden = max(64, int(gigabytes * 1e9 / 8 / 2 / VOCABULARY) // 64 * 64)
    layer = hidden * hidden * 2 * (2.5 + 3 * 3.5)  # bytes of one layer with the sizes below
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=int(3.5 * hidden),
        num_hidden_layers=max(1, int((gigabytes * 1e9 - 4 * VOCABULARY * hidden) / layer)),
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64 // (4 if hidden % 256 == 0 else 1),
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(str(folder))
    arguments, shapes = FAMILY.arguments(config), dict[str, Shape]()
    for row in FAMILY.active_rows(arguments):
        for index in row.indices(arguments):
            shapes |= zip(row.names(index), row.shapes(sizes(arguments, VOCABULARY)), strict=True)
    files: list[list[str]] = [[]]
    used = 0
    for name, shape in shapes.items():
        size = 2 * torch.Size(shape).numel()
        if files[-1] and used + size > SHARD:
            files.append([])
            used = 0
        files[-1].append(name)
        used += size
    noise = torch.randn(1 << 22, generator=torch.Generator().manual_seed(0)).bfloat16()
    where = {}
    for number, names in enumerate(files, 1):
        file = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        with SafetensorsStream(
            folder / file, {name: TensorSpec(shapes[name], torch.bfloat16) for name in names}
        ) as stream:
            for name in names:
                where[name] = file
                rows, columns = shapes[name][0], torch.Size(shapes[name][1:])
                step = max(1, len(noise) // columns.numel())
                for start in range(0, rows, step):
                    count = min(step, rows - start)
                    stream.write(name, noise[: count * columns.numel()].view(count, *columns))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    nbytes = [2 * torch.Size(shape).numel() for shape in shapes.values()]
    return sum(nbytes), max(nbytes)


def copy(source: Path, target: Path) -> None:
    """A plain copy that is on the disk when it returns, as a conversion's result is."""
    target.mkdir()
    for path in source.iterdir():
        shutil.copyfile(path, target / path.name)
        with (target / path.name).open("rb") as file:
            os.fsync(file.fileno())


def run(*arguments: object) -> int:
    """Run tools/convert_checkpoint.py; the most memory (all but mapped files) that it had, in
    bytes."""
    line = [sys.executable, CONVERT, *map(str, arguments), "--no-progress"]
    peak = 0
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as process:
        status = Path(f"/proc/{process.pid}/status")
        while process.poll() is None:
            if status.exists():
                rows = [row.split() for row in status.read_text().splitlines()]
                peak = max(
                    peak,
                    sum(int(row[1]) * 1024 for row in rows if row[0] in ("RssAnon:", "RssShmem:")),
                )
            time.sleep(0.005)
        if process.returncode:
            raise RuntimeError(f"{' '.join(line)} failed with {process.returncode}")
    return peak


def timed(work: Callable[..., Any], *arguments: object) -> tuple[float, Any]:
    """(seconds, result)."""
    start = time.perf_counter()
    result = work(*arguments)
    return time.perf_counter() - start, result


@command.says_errors
def main(argv: list[str] | None = None) -> int:
    """Measure and print a table; one JSON object in the last line."""
    args = parse(argv)
    output = Path(args.output)
    if output.exists():
        raise UserError(f"--output {output} exists: name a folder that does not")
    output.mkdir(parents=True)
    hf, megatron, back = output / "hf", output / "megatron", output / "back"
    try:
        total, largest = write_model(hf, args.gigabytes)
        seconds, _ = timed(copy, hf, output / "copy")
        shutil.rmtree(output / "copy")
        print(f"model: {total / 1e9:.2f} GB, largest tensor {largest / 1e9:.2f} GB")
        print(f"copy     {seconds:7.1f} s  {total / seconds / 1e9:.2f} GB/s")
        rows = {"copy": seconds}
        result: dict[str, Any] = {
            "bytes": total,
            "largest": largest,
            "seconds": rows,
            "anonymous": {},
        }
        for name, line in (
            ("import", ("import", "--hf", hf, "--megatron", megatron)),
            ("export", ("export", "--megatron", megatron, "--hf", back)),
            ("verify", ("verify", "--hf", back, "--megatron", megatron, "--weights-only")),
        ):
            rows[name], peak = timed(run, *line)
            result["anonymous"][name] = peak
            print(
                f"{name:8s} {rows[name]:7.1f} s  {total / rows[name] / 1e9:.2f} GB/s "
                f" {seconds / rows[name]:.0%} of the copy's, anonymous memory at most"
                f" {peak / 1e9:.2f} GB"
            )
        print(json.dumps(result))
    finally:
        shutil.rmtree(output, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
