"""Ask a teacher once and keep its answers, the most likely tokens at every supervised position, for
any number of training runs.

The teacher is a Megatron folder or a Hugging Face folder. Megatron computes the first, under
torchrun with any tensor, pipeline and data parallelism; flags of Megatron's own are passed on.
transformers computes the second, under torchrun with one copy of the model on each rank. The cache
is keyed by conversation: it serves any sequence length, batch size, layout, order, number of epochs
and objective. A killed job goes on where it stopped when it is started again.
"""

import argparse
import contextlib
import math
import os
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from megatron_tsft import entry, trust
from megatron_tsft.checkpoint.manifest import HOW
from megatron_tsft.data.prepared import PreparedData
from megatron_tsft.errors import UserError
from megatron_tsft.lock import hold_inside
from megatron_tsft.plan.checked import check_weights
from megatron_tsft.plan.command_line import Ranks
from megatron_tsft.plan.meeting import meet
from megatron_tsft.teacher.folder import (
    MegatronFolder,
    TeacherFolder,
    is_megatron,
    read_hf_folder,
    read_megatron_folder,
)
from megatron_tsft.teacher.format import expected_bytes
from megatron_tsft.teacher.job import Predictor, Share
from megatron_tsft.teacher.reader import TeacherCache
from megatron_tsft.teacher.request import CacheJob, plan_job
from megatron_tsft.teacher.writer import CacheWriter
from megatron_tsft.upstream.installed import check_megatron

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
BATCH_TOKENS = {"cuda": 8192, "cpu": 1024}
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
        help="the teacher: a Megatron folder (imported or trained) or a Hugging Face folder",
    )
    parser.add_argument(
        "--data",
        required=True,
        nargs="+",
        metavar="DIR",
        help="the conversations: folders that prepare_data.py made",
    )
    parser.add_argument(
        "--output",
        required=True,
        metavar="DIR",
        help="the folder of the cache; an unfinished one is continued",
    )
    parser.add_argument(
        "--top-k",
        required=True,
        type=int,
        metavar="K",
        help="how many tokens are kept at each position",
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=1.0,
        metavar="T",
        help="records are of the teacher's softmax(logits / T) (default: 1)",
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="the type that the teacher is computed in (default: bf16, on CPU fp32)",
    )
    parser.add_argument(
        "--vocab-size",
        type=int,
        metavar="N",
        help="token ids from N on get no mass (default: the size of the teacher's vocabulary)",
    )
    parser.add_argument(
        "--token-map",
        metavar="FILE",
        help="a JSON list: for each token of the data's tokenizer the teacher's id, or -1 where it"
        " has none",
    )
    parser.add_argument(
        "--batch-tokens",
        type=int,
        metavar="N",
        help="positions that go through the teacher at once (default: 8192, on CPU 1024)",
    )
    parser.add_argument(
        "--shard-bytes",
        type=int,
        metavar="N",
        help="the size of a file of the cache (default: it follows from the size of the data)",
    )
    parser.add_argument(
        "--device",
        choices=("cuda", "cpu"),
        help="where the teacher is computed (default: cuda where there is a GPU)",
    )
    parser.add_argument("--no-progress", action="store_true", help="show no progress bar")
    parser.add_argument(
        "--verify-files",
        choices=HOW,
        default=HOW[0],
        help="compare a Megatron teacher's files with their checksums first: every byte (the ranks"
        " share it), sizes, or nothing (default: %(default)s)",
    )
    trust.add_flag(parser)
    return parser.parse_known_args(argv)


def check_arguments(args: argparse.Namespace, flags: list[str]) -> bool:
    """Whether the teacher is a Megatron folder; refuses what the command line alone gives away."""
    for name in ("top_k", "batch_tokens", "shard_bytes", "vocab_size"):
        number = getattr(args, name)
        if number is not None and number < 1:
            raise UserError(f"--{name.replace('_', '-')} {number}: pass a positive number")
    if not 0 < args.temperature < math.inf:
        raise UserError(f"--temperature {args.temperature}: pass a positive number")
    megatron = is_megatron(Path(args.teacher))
    for name in OURS:
        if name in flags:
            raise UserError(
                f"{name} has no meaning when a teacher is cached: leave it out (--batch-tokens sets"
                " the batch)"
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
    device = entry.choose_device(args.device or "", "--device")
    folder: TeacherFolder
    if megatron:
        check_megatron()
        if device == "cpu":
            from megatron_tsft.cpu import install

            install()
        folder = found = read_megatron_folder(Path(args.teacher))
        check_weights(found.path, found.checkpoint, args.verify_files, Ranks.of_environment())
    else:
        folder = read_hf_folder(Path(args.teacher))
    job = plan_job(
        folder,
        data,
        top_k=args.top_k,
        temperature=args.temperature,
        dtype=args.dtype or ("bf16" if device == "cuda" else "fp32"),
        batch_tokens=args.batch_tokens or BATCH_TOKENS[device],
        vocab_size=args.vocab_size,
        token_map_file=args.token_map,
        shard_bytes=args.shard_bytes,
    )
    writer = CacheWriter(args.output, job.identity, job.plan)
    started = time.monotonic()
    with contextlib.ExitStack() as stack:
        meeting = meet(Ranks.of_environment())  # its store lives until the end
        if meeting.share(lambda: begin(writer, job, stack)):
            TeacherCache.load(args.output)
            return 0
        teacher = load_teacher(job, flags, device, stack)
        try:
            tokens = fill(writer, teacher, progress=rank == 0 and not args.no_progress)
        except UserError as error:
            error.met_here_alone = True  # of the ranks, which wait for each other from here on
            raise
        if rank == 0:
            finish(writer, tokens * teacher.share.ranks / (time.monotonic() - started))
    return 0


def begin(writer: CacheWriter, job: CacheJob, stack: contextlib.ExitStack) -> bool:
    """On rank 0: take the folder's lock, which `stack` gives back, and make the plan there; whether
    the cache is finished already."""
    folder = writer.directory
    # what is no folder is refused below; one that is finished is only read
    if not writer.finished and (folder.is_dir() or not folder.exists()):
        stack.enter_context(hold_inside(folder, f"--output {folder}"))
    writer.begin()
    if writer.finished:
        print(f"{folder} is finished already: nothing to do")
        return True
    announce(job, writer)
    return False


def load_teacher(
    job: CacheJob, flags: list[str], device: str, stack: contextlib.ExitStack
) -> Predictor:
    """The teacher on all ranks of this job; `stack` gets what leaves them."""
    import torch.distributed as dist

    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    dtype = job.identity.dtype
    if not isinstance(job.folder, MegatronFolder):
        from megatron_tsft.teacher.transformers_teacher import TransformersTeacher

        if world > 1:  # the ranks only wait for each other
            dist.init_process_group("gloo", timeout=PATIENCE)
            stack.callback(dist.destroy_process_group)
        share = Share(rank, world)
        return TransformersTeacher(job.folder.path, job.question, dtype, device, share)
    entry.be_a_rank()
    entry.megatron_environment()
    from megatron_tsft.training.megatron_teacher import MegatronTeacher

    teacher = MegatronTeacher(job.folder, job.question, flags, dtype=dtype, device=device)
    stack.callback(dist.destroy_process_group)
    return teacher


def fill(writer: CacheWriter, teacher: Predictor, *, progress: bool) -> int:
    """Compute what is missing, on all ranks; returns when all of it is there."""
    import torch.distributed as dist

    from megatron_tsft.teacher.job import fill_cache

    todo: list[Any] = [writer.missing()]
    if dist.is_initialized():
        # one list: a disk may show ranks different things
        dist.broadcast_object_list(todo, src=0)
    tokens = fill_cache(writer, teacher, todo[0], progress=progress)
    if dist.is_initialized():
        dist.barrier()
    return tokens


def announce(job: CacheJob, writer: CacheWriter) -> None:
    """Say what is going to be written."""
    plan, k = job.plan, job.identity.top_k
    size = expected_bytes(plan.conversations, plan.tokens, k)
    done = plan.shards - len(writer.missing())
    resumed = f", {done} of them are there already" if done else ""
    print(
        f"teacher {job.folder.path} ({job.folder.what}): top-{k} of {plan.tokens} supervised tokens"
        f" in {plan.conversations} distinct conversations, about {size / 2**20:.1f} MiB in"
        f" {plan.shards} shards{resumed}",
        flush=True,
    )


def finish(writer: CacheWriter, tokens_per_second: float) -> None:
    """Complete the cache and say what was written."""
    card = writer.finish()
    size = sum(shard["bytes"] for shard in card.shards.values())
    speed = ""
    if tokens_per_second:
        speed = f"; {tokens_per_second:.0f} supervised tokens/s with start-up"
    print(
        f"wrote {writer.directory}: {card.conversations} conversations, {card.tokens} supervised"
        f" tokens, {size / 2**20:.1f} MiB in {len(card.shards)} shards{speed}"
    )


def main(argv: list[str] | None = None) -> int:
    """Cache; the exit status is 0, or 2 for a user's error."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    args, flags = parse(argv)
    left = "; the same command goes on where it stopped"
    return entry.run_command(lambda: run(args, flags), name="caching", left=left, trust=args.trust)
