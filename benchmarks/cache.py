#!/usr/bin/env python3
"""What a teacher cache costs: writing it over the teacher's own forward pass, and reading it over a
training step.

Writing: the same batches through a Hugging Face teacher, alone (logits only), and with top-k, tail,
Arrow and fsync, in turn; their ratio. Reading: cutting packs with the teacher's records and
without; the difference, in milliseconds a pack and, with --step-seconds, as a share of a training
step.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from megatron_tsft.data.packed_dataset import PackedDataset
from megatron_tsft.data.prepared import PreparedData, Sample
from megatron_tsft.teacher.format import CacheIdentity, expected_bytes
from megatron_tsft.teacher.job import Share, fill_cache
from megatron_tsft.teacher.plan import plan_cache
from megatron_tsft.teacher.reader import CachedTeacher, TeacherCache
from megatron_tsft.teacher.request import Question
from megatron_tsft.teacher.transformers_teacher import TransformersTeacher
from megatron_tsft.teacher.writer import CacheWriter
from shared import command

EXAMPLE = """example:
  benchmarks/cache.py --teacher SmolLM2-135M --data data/train --top-k 16 64 --step-seconds 8
"""


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; see EXAMPLE."""
    parser = command.parser(__doc__, EXAMPLE)
    parser.add_argument("--teacher", required=True, metavar="DIR", help="Hugging Face folder")
    parser.add_argument(
        "--data", required=True, metavar="DIR", help="folder made by prepare_data.py"
    )
    parser.add_argument(
        "--top-k", type=int, nargs="+", default=[16, 64], metavar="K", help="(default: 16 64)"
    )
    parser.add_argument(
        "--seq-length", type=int, default=4096, metavar="N", help="of packs to read (default: 4096)"
    )
    parser.add_argument("--repeat", type=int, default=3, metavar="N", help="(default: 3)")
    parser.add_argument(
        "--step-seconds",
        type=float,
        metavar="S",
        help="of a training step, to compare reading with",
    )
    parser.add_argument(
        "--packs-per-step", type=int, default=1, metavar="N", help="a rank reads (default: 1)"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(argv)


class Alone(TransformersTeacher):
    """The teacher's forward pass and nothing else."""

    def _batch(self, samples: list[Sample]) -> list:  # type: ignore[override]
        width = len(samples[0].input_ids)
        tokens = torch.zeros(len(samples), width, dtype=torch.int64)
        for i, sample in enumerate(samples):
            tokens[i, : len(sample.input_ids)] = torch.from_numpy(sample.input_ids.astype(np.int64))
        with torch.no_grad():
            self.model(input_ids=tokens.to(self.device), use_cache=False)
        if self.device == "cuda":
            torch.cuda.synchronize()
        return [np.flatnonzero(sample.loss_mask) for sample in samples]


def seconds(work: Callable[[], object]) -> float:
    """Of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def writing(args: argparse.Namespace, data: PreparedData, top_k: int, folder: Path) -> str:
    """A line about writing; leaves the cache in `folder`."""
    vocab_size = json.loads((Path(args.teacher) / "config.json").read_text())["vocab_size"]
    identity = CacheIdentity(
        "teacher", "", data.card.tokenizer_fingerprint, vocab_size, top_k, 1.0, "fp32", []
    )
    kind = "bf16" if args.device == "cuda" else "fp32"
    batch_tokens = 8192 if args.device == "cuda" else 1024
    question = Question(top_k, 1.0, vocab_size, None, batch_tokens)
    arguments = Path(args.teacher), question, kind, args.device, Share(0, 1)
    whole, alone = TransformersTeacher(*arguments), Alone(*arguments)
    plan = plan_cache([data], top_k)

    def write(number: int) -> None:
        writer = CacheWriter(folder / str(number), identity, plan)
        writer.begin()
        fill_cache(writer, whole, progress=False)
        writer.finish()

    class Nowhere(CacheWriter):
        def missing(self) -> list[int]:
            return list(range(self.plan.shards))

        def write_shard(self, number: int, records: object) -> int:
            return 0

    nowhere = Nowhere(folder, identity, plan)
    fill_cache(nowhere, alone, progress=False)  # warm
    pairs = [
        (seconds(lambda i=i: write(i)), seconds(lambda: fill_cache(nowhere, alone, progress=False)))
        for i in range(args.repeat)
    ]
    ratio = statistics.median(a / b for a, b in pairs)
    size = sum(path.stat().st_size for path in (folder / "0").glob("*.arrow"))
    per = size / (plan.tokens * top_k)
    assert size >= expected_bytes(plan.conversations, plan.tokens, top_k) * 0.99
    return (
        f"top-{top_k}: writing takes {ratio:.3f} x the teacher's forward alone ({pairs[0][1]:.2f} s"
        f" for {plan.tokens} supervised of {data.card.tokens} tokens); {per:.2f} bytes an entry on"
        " disk"
    )


def reading(args: argparse.Namespace, data: PreparedData, folder: Path) -> str:
    """A line about reading."""
    plain = PackedDataset(
        data, seq_length=args.seq_length, global_batch_size=1, seed=0, long_samples="truncate"
    )
    taught = plain.with_teacher(
        CachedTeacher([TeacherCache.load(folder)], data), data.card.weighted
    )
    count = min(plain.packs, 50)
    pairs = []
    for _ in range(args.repeat):
        pairs.append(
            [
                seconds(lambda packs=packs: [packs[i] for i in range(count)]) / count
                for packs in (taught, plain)
            ]
        )
    more = statistics.median(a - b for a, b in pairs)
    share = ""
    if args.step_seconds:
        share = (
            f"; {100 * more * args.packs_per_step / args.step_seconds:.3f}% of a step of"
            f" {args.step_seconds:g} s"
        )
    return f"reading: {1000 * more:.2f} ms more a pack of {args.seq_length}{share}"


@command.says_errors
def main(argv: list[str] | None = None) -> int:
    """Benchmark; the exit status is 0, or 2 for a user's error."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    args = parse(argv)
    data = PreparedData.load(args.data)
    for top_k in args.top_k:
        with tempfile.TemporaryDirectory() as folder:
            print(writing(args, data, top_k, Path(folder)), flush=True)
            print(f"top-{top_k}: {reading(args, data, Path(folder) / '0')}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
