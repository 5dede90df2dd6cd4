"""Say what is in a teacher cache: which teacher was asked, how many tokens it holds, how much mass
its top-k leaves out, and which data it covers.

All of the cache is read, so this also tells whether a copy is whole.
"""

import argparse
import json
import os
from pathlib import Path

import numpy as np
from tqdm import tqdm

from megatron_tsft import trust
from megatron_tsft.atomic import write_text
from megatron_tsft.data.prepared import PreparedData
from megatron_tsft.entry import run_command
from megatron_tsft.teacher.reader import TeacherCache

EXAMPLE = """examples:
  tools/inspect_cache.py cache --data data/train
  tools/inspect_cache.py cache --data data/train data/heldout --json cache.json
"""
EDGES = (0.0, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.03, 0.1, 0.3, 1.0)  # of the tail-mass histogram
BAR = 40  # characters


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; see EXAMPLE."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cache", metavar="CACHE_DIR", help="a folder that cache_teacher.py made")
    parser.add_argument(
        "--data",
        nargs="+",
        default=[],
        metavar="DIR",
        help="prepared folders whose conversations are looked up in it",
    )
    parser.add_argument("--json", metavar="FILE", help="also write everything to a JSON file")
    parser.add_argument("--no-progress", action="store_true", help="show no progress bar")
    trust.add_flag(parser)
    return parser.parse_args(argv)


def inspect(cache: TeacherCache, data: list[PreparedData]) -> dict:
    """Everything there is to say, as JSON would have it."""
    card, identity = cache.card, cache.card.identity
    size = sum(facts["bytes"] for facts in card.shards.values())
    tail = np.exp(cache.tail_logmass().astype(np.float64))
    counts, _ = np.histogram(np.clip(tail, 0, 1), EDGES)
    return {
        "teacher": identity.teacher,
        "teacher_hash": identity.teacher_hash,
        "tokenizer_fingerprint": identity.tokenizer_fingerprint,
        "vocab_size": identity.vocab_size,
        "top_k": identity.top_k,
        "temperature": identity.temperature,
        "dtype": identity.dtype,
        "token_map": identity.token_map,
        "conversations": card.conversations,
        "tokens": card.tokens,
        "shards": len(card.shards),
        "bytes": size,
        "bytes_per_token": size / card.tokens,
        "bytes_per_entry": size / (card.tokens * identity.top_k),
        "tail_mass": {
            "mean": float(tail.mean()),
            "median": float(np.median(tail)),
            "p99": float(np.quantile(tail, 0.99)),
            "histogram": {"edges": list(EDGES), "counts": counts.tolist()},
        },
        "coverage": [coverage(cache, part) for part in data],
    }


def coverage(cache: TeacherCache, data: PreparedData) -> dict:
    """How much of a data set has a record."""
    has_record = cache.find(data) >= 0
    return {
        "data": str(data.directory),
        "fingerprint": data.card.fingerprint,
        "made_for_it": data.card.fingerprint in cache.card.identity.data,
        "same_tokenizer": data.card.tokenizer_fingerprint
        == cache.card.identity.tokenizer_fingerprint,
        "conversations": len(data),
        "found": int(has_record.sum()),
        "first_missing": None
        if has_record.all()
        else data.sample_ids[int(np.flatnonzero(~has_record)[0])].as_py(),
    }


def show(facts: dict) -> None:
    """Print it for people."""
    print(
        f"teacher: {facts['teacher']} (weights {facts['teacher_hash']}, {facts['dtype']}),"
        f" temperature {facts['temperature']:g}, top-{facts['top_k']} of {facts['vocab_size']}"
        " tokens, tokenizer"
        f" {facts['tokenizer_fingerprint']}{', by a token map' if facts['token_map'] else ''}"
    )
    print(
        f"records: {facts['conversations']} conversations, {facts['tokens']} supervised tokens;"
        f" {facts['bytes']} bytes in {facts['shards']} shards, {facts['bytes_per_token']:.1f} a"
        f" token, {facts['bytes_per_entry']:.2f} an entry; every checksum is right"
    )
    tail = facts["tail_mass"]
    print(
        f"mass outside the top-k: mean {tail['mean']:.2e}, median {tail['median']:.2e}, 99% below"
        f" {tail['p99']:.2e}"
    )
    counts, edges = tail["histogram"]["counts"], tail["histogram"]["edges"]
    for count, low, high in zip(counts, edges, edges[1:], strict=False):
        bar = "#" * round(BAR * count / max(counts)) if count else ""
        print(f"  {low:7.0e} to {high:7.0e}  {100 * count / facts['tokens']:5.1f}%  {bar}")
    for part in facts["coverage"]:
        made = "made for it" if part["made_for_it"] else "not made for it"
        missing = (
            f"; the first one without a record: {part['first_missing']}"
            if part["first_missing"]
            else ""
        )
        other = "" if part["same_tokenizer"] else "; ANOTHER TOKENIZER"
        print(
            f"{part['data']}: {part['found']} of {part['conversations']} conversations"
            f" ({made}){missing}{other}"
        )


def run(args: argparse.Namespace) -> int:
    """Inspect; 0, or 1 where a data set is not covered."""
    cache = TeacherCache.load(args.cache)
    total = sum(facts["bytes"] for facts in cache.card.shards.values())
    with tqdm(
        total=total, unit="B", unit_scale=True, desc="reading", disable=args.no_progress
    ) as bar:
        cache.verify(bar.update)
    facts = inspect(cache, [PreparedData.load(directory) for directory in args.data])
    show(facts)
    if args.json:
        write_text(Path(args.json), json.dumps(facts, indent=1) + "\n")
        print(f"wrote {args.json}")
    covered = (
        part["found"] == part["conversations"] and part["same_tokenizer"]
        for part in facts["coverage"]
    )
    return 0 if all(covered) else 1


def main(argv: list[str] | None = None) -> int:
    """Inspect; the exit status is 0, 1 where a data set is not covered, 2 for a user's error."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    args = parse(argv)
    return run_command(lambda: run(args), name="inspecting", trust=args.trust)
