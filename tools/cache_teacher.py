#!/usr/bin/env python3
"""Ask a teacher once and keep what it says: the most likely tokens of every supervised position,
for any training run.

The teacher is a Megatron folder (under torchrun, with any tensor, pipeline and data parallelism;
flags of Megatron's own are passed on) or a Hugging Face folder (transformers; under torchrun one
copy a rank). The cache is keyed by conversation: it serves any sequence length, batch size, layout,
order, number of epochs and objective. A killed job goes on where it stopped when it is started
again.
"""

import argparse
import contextlib
import math
import os
import socket
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from megatron_tsft.checkpoint.card import CARD_FILE
from megatron_tsft.data.prepared import PreparedData
from megatron_tsft.errors import UserError
from megatron_tsft.teacher.format import CacheIdentity, expected_bytes
from megatron_tsft.teacher.plan import plan_cache
from megatron_tsft.teacher.reader import TeacherCache
from megatron_tsft.teacher.writer import CacheWriter

EXAMPLE = """examples:
  tools/cache_teacher.py --teacher Qwen3-8B --data data/train data/heldout --output cache --top-k 64
  torchrun --nproc-per-node 8 tools/cache_teacher.py --teacher base70b --data data/train \\
      --output cache --top-k 64 --tensor-model-parallel-size 8
  torchrun --nproc-per-node 2 tools/cache_teacher.py --teacher base --data data/train \\
      --output cache --top-k 16 --device cpu --pipeline-model-parallel-size 2
"""
OURS = (
    "--micro-batch-size",
    "--global-batch-size",
    "--seq-length",
    "--train-iters",
    "--load",
    "--save",
)
PATIENCE = timedelta(days=7)  # a rank that is done waits for the others' last shards
DTYPES = ("fp32", "bf16", "fp16")


def parse(argv: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """(our arguments, Megatron's flags)."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--teacher",
        required=True,
        metavar="DIR",
        help="Megatron folder (imported or trained) or HF folder",
    )
    parser.add_argument(
        "--data", required=True, nargs="+", metavar="DIR", help="folders made by prepare_data.py"
    )
    parser.add_argument(
        "--output", required=True, metavar="DIR", help="the cache; an unfinished one is continued"
    )
    parser.add_argument(
        "--top-k", required=True, type=int, metavar="K", help="tokens to keep a position"
    )
    parser.add_argument(
        "--temperature", type=float, default=1.0, metavar="T", help="of the teacher (default: 1)"
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, help="the teacher's (default: bf16, on CPU fp32)"
    )
    parser.add_argument(
        "--vocab-size",
        type=int,
        metavar="N",
        help="leave ids from N on out (default: the teacher's own)",
    )
    parser.add_argument(
        "--token-map",
        metavar="FILE",
        help="JSON list: the teacher's id of each token of the data's tokenizer, -1: none",
    )
    parser.add_argument(
        "--batch-tokens",
        type=int,
        metavar="N",
        help="positions that go through the teacher at once (8192, on CPU 1024)",
    )
    parser.add_argument(
        "--shard-bytes", type=int, metavar="N", help="of a file (default: by the size of the data)"
    )
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), help="default: cuda where there is one"
    )
    parser.add_argument("--no-progress", action="store_true", help="no progress bar")
    return parser.parse_known_args(argv)


def choose_device(wanted: str | None) -> str:
    """--device, or cuda where there is one."""
    if wanted != "cpu":
        import torch

        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
            return "cuda"
        if wanted == "cuda":
            raise UserError("--device cuda: torch sees no GPU; pass --device cpu")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    return "cpu"


def check_arguments(args: argparse.Namespace, flags: list[str]) -> bool:
    """Whether the teacher is a Megatron folder; refuses what can be refused by looking at the
    command line alone."""
    for name in ("top_k", "batch_tokens", "shard_bytes", "vocab_size"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(
                f"--{name.replace('_', '-')} {getattr(args, name)}: pass a positive number"
            )
    if not 0 < args.temperature < math.inf:
        raise UserError(f"--temperature {args.temperature}: pass a positive number")
    folder = Path(args.teacher)
    megatron = (folder / CARD_FILE).is_file()
    if not megatron and not (folder / "config.json").is_file():
        raise UserError(
            f"{folder} is no teacher: it has neither {CARD_FILE} (imported) nor config.json"
            " (Hugging Face)"
        )
    for name in OURS:
        if name in flags:
            raise UserError(
                f"{name} has no meaning when a teacher is cached: leave it out (--batch-tokens"
                " sets the batch)"
            )
    if flags and not megatron:
        raise UserError(
            f"{' '.join(flags)}: a Hugging Face teacher takes no Megatron flags; --help lists ours"
        )
    return megatron


def run(args: argparse.Namespace, flags: list[str]) -> int:
    """Make the cache."""
    rank, megatron = int(os.environ.get("RANK", "0")), check_arguments(args, flags)
    data = [PreparedData.load(directory) for directory in args.data]
    device = choose_device(args.device)
    facts = megatron_facts(Path(args.teacher), device) if megatron else hf_facts(Path(args.teacher))
    token_map, vocab_size = vocabulary(args, facts, data)
    identity = CacheIdentity(
        teacher=Path(args.teacher).resolve().name,
        teacher_hash=facts["hash"],
        tokenizer_fingerprint=data[0].card.tokenizer_fingerprint,
        vocab_size=vocab_size,
        top_k=min(args.top_k, vocab_size),
        temperature=args.temperature,
        dtype=args.dtype or ("bf16" if device == "cuda" else "fp32"),
        data=[part.card.fingerprint for part in data],
        token_map=None if token_map is None else hash_of(token_map),
    )
    plan = plan_cache(data, identity.top_k, args.shard_bytes)
    longest = int(plan.lengths.max())
    if (
        facts["positions"] is not None and longest > facts["positions"] + 1
    ):  # the last token is only a label
        raise UserError(
            f"a conversation has {longest} tokens, the teacher knows {facts['positions']}"
            " positions: prepare the data"
            f" with --max-tokens {facts['positions']}"
        )
    writer = CacheWriter(args.output, identity, plan)
    if rank == 0:
        writer.begin()
    if writer.finished:
        TeacherCache.load(args.output)
        if rank == 0:
            print(f"{args.output} is finished already: nothing to do")
        return 0
    if rank == 0:
        announce(args, facts, writer)
    started = time.monotonic()
    with contextlib.ExitStack() as stack:
        teacher = load_teacher(args, flags, facts, identity, token_map, device, stack)
        tokens = fill(writer, teacher, progress=rank == 0 and not args.no_progress)
        if rank == 0:
            card, seconds = writer.finish(), time.monotonic() - started
            size = sum(shard["bytes"] for shard in card.shards.values())
            speed = (
                f"; {tokens * teacher.share[1] / seconds:.0f} supervised tokens/s with start-up"
                if tokens
                else ""
            )
            print(
                f"wrote {args.output}: {card.conversations} conversations, {card.tokens}"
                " supervised tokens,"
                f" {size / 2**20:.1f} MiB in {len(card.shards)} shards{speed}"
            )
    return 0


def load_teacher(
    args: argparse.Namespace,
    flags: list[str],
    facts: dict[str, Any],
    identity: CacheIdentity,
    token_map: Any,
    device: str,
    stack: contextlib.ExitStack,
) -> Any:
    """The teacher on all ranks of this job; `stack` gets what leaves them."""
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    options = {
        "top_k": identity.top_k,
        "temperature": identity.temperature,
        "vocab_size": identity.vocab_size,
    }
    options |= {
        "token_map": token_map,
        "batch_tokens": args.batch_tokens or (8192 if device == "cuda" else 1024),
    }
    if "card" not in facts:
        stack.callback(start_ranks(world))
        return hf_teacher(Path(args.teacher), identity.dtype, device, (rank, world), options)
    alone()
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # Megatron insists on it
    import torch.distributed as dist

    from megatron_tsft.training.megatron_teacher import MegatronTeacher

    teacher = MegatronTeacher(
        Path(args.teacher),
        facts["card"],
        facts["checkpoint"],
        flags,
        dtype=identity.dtype,
        device=device,
        world_size=int(os.environ["WORLD_SIZE"]),
        **options,
    )
    stack.callback(dist.destroy_process_group)
    return teacher


def fill(writer: CacheWriter, teacher: Any, *, progress: bool) -> int:
    """Compute what is missing, on all ranks; returns when all of it is there."""
    import torch.distributed as dist

    from megatron_tsft.teacher.job import fill_cache

    todo = [writer.missing()]
    if dist.is_initialized():
        dist.broadcast_object_list(todo, src=0)  # one list: a disk may show ranks different things
    tokens = fill_cache(writer, teacher, todo[0], progress=progress)
    if dist.is_initialized():
        dist.barrier()
    return tokens


def vocabulary(
    args: argparse.Namespace, facts: dict[str, Any], data: list[PreparedData]
) -> tuple[Any, int]:
    """(token map or None, the vocabulary of the records); refuses a teacher of another
    tokenizer."""
    from megatron_tsft.teacher.tokens import check_same_tokenizer, read_token_map

    for part in data[1:]:
        if part.card.tokenizer_fingerprint != data[0].card.tokenizer_fingerprint:
            raise UserError(
                f"{part.directory} and {data[0].directory} were prepared with different"
                " tokenizers: cache each"
            )
    if args.token_map:
        if args.vocab_size is None:
            raise UserError("--token-map needs --vocab-size N, the student's vocabulary")
        return read_token_map(
            args.token_map, args.vocab_size, facts["vocab_size"], data
        ), args.vocab_size
    check_same_tokenizer(args.teacher, facts["tokenizer"], data, "pass a --token-map")
    largest = max(part.card.vocab_size for part in data)
    vocab_size = args.vocab_size or facts["vocab_size"]
    if vocab_size > facts["vocab_size"]:
        raise UserError(
            f"--vocab-size {vocab_size}: the teacher's vocabulary is {facts['vocab_size']}, pass"
            " at most that"
        )
    if largest > vocab_size:
        raise UserError(
            f"the data holds token id {largest - 1}, beyond a vocabulary of {vocab_size}: pass a"
            " larger one"
        )
    return None, vocab_size


def megatron_facts(folder: Path, device: str) -> dict[str, Any]:
    """What there is to know of a Megatron folder."""
    if device == "cpu":
        from megatron_tsft.cpu import install

        install()
    from megatron_tsft.checkpoint.card import ModelCard
    from megatron_tsft.checkpoint.fingerprint import weights_fingerprint
    from megatron_tsft.checkpoint.folder import latest_checkpoint
    from megatron_tsft.checkpoint.keys import compare_keys
    from megatron_tsft.checkpoint.units import expected_keys

    card, checkpoint = ModelCard.load(folder), latest_checkpoint(folder)
    compare_keys(expected_keys(card), checkpoint)
    return {
        "card": card,
        "checkpoint": checkpoint,
        "hash": weights_fingerprint(
            checkpoint, "*", architecture=sorted(card.megatron_arguments.items())
        ),
        "positions": card.megatron_arguments["max_position_embeddings"],
        "tokenizer": card.tokenizer_fingerprint,
        "vocab_size": card.vocab_size,
        "what": f"{card.architecture}, {checkpoint.name}",
    }


def hf_facts(folder: Path) -> dict[str, Any]:
    """What there is to know of a Hugging Face folder."""
    from megatron_tsft.checkpoint.fingerprint import weights_fingerprint
    from megatron_tsft.checkpoint.hf_folder import load_config
    from megatron_tsft.checkpoint.tokenizer import load_tokenizer, tokenizer_fingerprint

    config = load_config(folder)
    return {
        "hash": weights_fingerprint(folder, "config.json", "*.safetensors", "*.bin"),
        "positions": getattr(config, "max_position_embeddings", None),
        "tokenizer": tokenizer_fingerprint(load_tokenizer(folder)),
        "vocab_size": config.vocab_size,
        "what": (config.architectures or ["?"])[0],
    }


def hf_teacher(
    folder: Path, dtype: str, device: str, share: tuple[int, int], options: dict[str, Any]
) -> Any:
    """The loaded Hugging Face teacher."""
    import torch

    from megatron_tsft.teacher.transformers_teacher import TransformersTeacher

    kinds = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    return TransformersTeacher(folder, dtype=kinds[dtype], device=device, share=share, **options)


def alone() -> None:
    """Without torchrun: the one rank of a job of its own."""
    if "WORLD_SIZE" not in os.environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        os.environ |= {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "WORLD_SIZE": "1",
            "RANK": "0",
        }
        os.environ["LOCAL_RANK"] = "0"


def start_ranks(world: int) -> Any:
    """Join the other ranks, which only wait for each other; returns what leaves them."""
    if world == 1:
        return lambda: None
    import torch.distributed as dist

    dist.init_process_group("gloo", timeout=PATIENCE)
    return dist.destroy_process_group


def announce(args: argparse.Namespace, facts: dict[str, Any], writer: CacheWriter) -> None:
    """Say what is going to be written."""
    plan, k = writer.plan, writer.identity.top_k
    size = expected_bytes(plan.conversations, plan.tokens, k)
    done = plan.shards - len(writer.missing())
    resumed = f", {done} of them are there already" if done else ""
    print(
        f"teacher {args.teacher} ({facts['what']}): top-{k} of {plan.tokens} supervised tokens in"
        f" {plan.conversations}"
        f" distinct conversations, about {size / 2**20:.1f} MiB in {plan.shards} shards{resumed}",
        flush=True,
    )


def hash_of(values: list[int]) -> str:
    """16 hex digits."""
    import hashlib

    return hashlib.sha256(repr(values).encode()).hexdigest()[:16]


def main(argv: list[str] | None = None) -> int:
    """Cache; the exit status is 0, or 2 for a user's error."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    args, flags = parse(argv)
    try:
        return run(args, flags)
    except UserError as error:
        if os.environ.get("RANK", "0") != "0":
            time.sleep(1)  # rank 0 speaks: most errors meet every rank
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
