#!/usr/bin/env python3
"""What preparing data costs over the two things that it must do: rendering the chat template and
tokenising in batches.

Random chats of one to four turns, from a seed. Both sides run in turn in this process and start
from the file's lines; ours also finds and checks the turns, makes the masks, and writes the
prepared folder. Our start-up, a preparation of one row, is subtracted. With --memory, preparations
of so many short rows run in processes of their own, and what a row costs in peak memory is their
difference.
"""

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_tsft.checkpoint.tokenizer import load_tokenizer
from megatron_tsft.data.prepare import prepare
from shared import command

EXAMPLE = """examples:
  benchmarks/prepare.py --tokenizer SmolLM2-135M --chats 20000
  benchmarks/prepare.py --tokenizer SmolLM2-135M --chats 2000 --memory 1000000 4000000
"""
BATCH = 64  # rows that are tokenised together, as the preparation does


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; see EXAMPLE."""
    parser = command.parser(__doc__, EXAMPLE)
    parser.add_argument("--tokenizer", required=True, metavar="DIR", help="Hugging Face folder")
    parser.add_argument("--chats", type=int, default=20000, metavar="N", help="(default: 20000)")
    parser.add_argument("--repeat", type=int, default=3, metavar="N", help="(default: 3)")
    parser.add_argument(
        "--memory", type=int, nargs=2, metavar="ROWS", help="two numbers of short rows"
    )
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)  # a process of --memory: its input
    return parser.parse_args(argv)


def chats(count: int, longest: int, turns: int) -> Iterator[dict[str, Any]]:
    """Conversations of up to `turns` turns with answers of up to `longest` words."""
    g = random.Random(0)
    words = ["".join(g.choices("etaoinshrdlucmfwyp", k=g.randint(2, 9))) for _ in range(4000)]
    for _ in range(count):
        messages = []
        for _ in range(g.randint(1, turns)):
            for role, most in (("user", longest // 3), ("assistant", longest)):
                text = " ".join(g.choices(words, k=g.randint(1, max(1, most))))
                messages.append({"role": role, "content": text})
        yield {"messages": messages}


def write(path: Path, rows: Iterator[dict[str, Any]]) -> Path:
    with path.open("w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def floor(path: Path, tokenizer: Any) -> tuple[float, int]:
    """(seconds, tokens) of rendering and tokenising alone."""
    from transformers.utils.chat_template_utils import (
        _compile_jinja_template,  # pyright: ignore[reportPrivateUsage]
    )

    template = _compile_jinja_template(tokenizer.chat_template)
    backend, special = tokenizer.backend_tokenizer, tokenizer.special_tokens_map
    begun, tokens, texts = time.perf_counter(), 0, []
    with path.open() as file:
        for line in file:
            texts.append(template.render(messages=json.loads(line)["messages"], **special))
            if len(texts) == BATCH:
                found = backend.encode_batch(texts, add_special_tokens=False)
                tokens += sum(len(encoding.ids) for encoding in found)
                texts = []
    found = backend.encode_batch(texts, add_special_tokens=False)
    tokens += sum(len(encoding.ids) for encoding in found)
    return time.perf_counter() - begun, tokens


def ours(path: Path, tokenizer: str, output: Path) -> float:
    """Seconds of a preparation."""
    begun = time.perf_counter()
    prepare(path, tokenizer, output, progress=False)
    return time.perf_counter() - begun


def peak(path: Path, tokenizer: str) -> int:
    """Bytes at most resident of a process that prepares a file."""
    line = [sys.executable, __file__, "--tokenizer", tokenizer, "--memory-of", str(path)]
    return int(subprocess.run(line, capture_output=True, text=True, check=True).stdout)


@command.says_errors
def main(argv: list[str] | None = None) -> int:
    """Benchmark; the exit status is 0, or 2 for a user's error."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    args = parse(argv)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.memory_of:
            prepare(args.memory_of, args.tokenizer, folder / "out", progress=False)
            print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
            return 0
        tokenizer = load_tokenizer(args.tokenizer)
        path = write(folder / "chats.jsonl", chats(args.chats, 160, 4))
        one = write(folder / "one.jsonl", chats(1, 160, 4))
        ours(one, args.tokenizer, folder / "first")  # imports
        ratios, tokens = [], 0
        for i in range(args.repeat):
            start = ours(one, args.tokenizer, folder / f"start{i}")
            least, tokens = floor(path, tokenizer)
            ratios.append((ours(path, args.tokenizer, folder / f"out{i}") - start) / least)
        print(
            f"{args.chats} chats, {path.stat().st_size / 1e6:.1f} MB, {tokens} tokens: preparing"
            f" takes {statistics.median(ratios):.2f} x rendering and batch-tokenising alone"
            f" ({', '.join(f'{ratio:.2f}' for ratio in ratios)})",
            flush=True,
        )
        if args.memory:
            few, many = sorted(args.memory)
            peaks = [
                peak(write(folder / f"{n}.jsonl", chats(n, 3, 1)), args.tokenizer)
                for n in (few, many)
            ]
            print(
                f"peak memory at {few} and {many} short rows: {peaks[0] / 1e6:.0f} and"
                f" {peaks[1] / 1e6:.0f} MB, {(peaks[1] - peaks[0]) / (many - few):.0f} bytes a row"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
