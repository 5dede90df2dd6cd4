"""The blocks of an input, encoded in this process or in others, in the order of the input."""

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from typing import Any

from megatron_tsft.checkpoint.tokenizer import load_tokenizer
from megatron_tsft.data.chat import ChatEncoder, Planned
from megatron_tsft.data.encoding import Job, Outcome, encode_block, finish_block, plan_block
from megatron_tsft.data.source import Block, Source
from megatron_tsft.errors import UserError
from megatron_tsft.trust import trusting

PRELOAD = ["__main__", "megatron_tsft.data.workers", "transformers.models.auto.tokenization_auto"]


def outcomes_of(
    rows: Source, encoder: ChatEncoder, job: Job, workers: int
) -> Generator[tuple[list[Outcome], int]]:
    """(outcomes, how much of the input they end at) of every block.

    Raises:
        UserError: a worker died, or the input or the tokenizer is not what it should be.
    """
    if workers == 1:
        yield from _one_ahead(rows, encoder, job)
        return
    # A fork of this process, with its threads, may hang, and every
    # spawned one would import transformers anew, which takes seconds and
    # 400 MB: so workers are forks of a server that has only imported.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    pool = ProcessPoolExecutor(workers, context, _start_worker, (job,))
    waiting: deque[tuple[Future[list[Outcome]], int]] = deque()
    try:
        for block in rows.blocks():
            waiting.append((pool.submit(_work, block), block.done))
            if len(waiting) > 2 * workers:  # so that reading does not run ahead of tokenising
                future, done = waiting.popleft()
                yield future.result(), done
        while waiting:
            future, done = waiting.popleft()
            yield future.result(), done
    except BrokenProcessPool as error:
        raise UserError(
            "a worker process died, perhaps for lack of memory: pass fewer --workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _one_ahead(
    rows: Source, encoder: ChatEncoder, job: Job
) -> Generator[tuple[list[Outcome], int]]:
    """In this process: while the tokenizer's threads work on a block, the next one is planned."""
    with ThreadPoolExecutor(1) as thread:
        before: tuple[Block, Planned, Future[list[Any]]] | None = None
        for block in rows.blocks():
            planned = plan_block(encoder, job, block)
            started = thread.submit(encoder.tokenise, planned)
            if before is not None:
                yield _finished(encoder, job, *before)
            before = block, planned, started
        if before is not None:
            yield _finished(encoder, job, *before)


def _finished(
    encoder: ChatEncoder, job: Job, block: Block, planned: Planned, started: "Future[list[Any]]"
) -> tuple[list[Outcome], int]:
    return finish_block(encoder, job, block, planned, started.result()), block.done


# of a worker process: what `encode_block` needs beside the block, sent once and not with each
_encode: Any = None


def _start_worker(job: Job) -> None:
    global _encode
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # no pool of threads in every worker
    with trusting(job.trust):
        encoder = ChatEncoder(load_tokenizer(job.tokenizer_dir), job.encoding)
    _encode = partial(encode_block, encoder, job)


def _end_with_parent() -> None:
    """A pool's workers wait for ever when the parent is killed, because each holds the other end of
    its own pipe."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(block: Block) -> list[Outcome]:
    return _encode(block)
