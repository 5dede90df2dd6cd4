"""Fills a cache: this rank's shards, one after the other, from a teacher that is loaded."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor
from tqdm import tqdm

from megatron_tsft.data.prepared import Sample
from megatron_tsft.data.teacher_rows import TeacherRows
from megatron_tsft.loss.records import TeacherRecords
from megatron_tsft.teacher.format import expected_bytes
from megatron_tsft.teacher.writer import CacheWriter

FLOAT16_MIN = float(np.finfo(np.float16).min)


@dataclass(frozen=True)
class Share:
    """Which part of the shards a data-parallel rank computes: every `ranks`-th from `rank` on."""

    rank: int
    ranks: int


class Predictor(Protocol):
    """A teacher that is loaded, on all ranks that compute it together."""

    @property
    def share(self) -> Share:
        """What this rank computes."""
        ...

    @property
    def writes(self) -> bool:
        """Whether this rank has the records: one of each data-parallel rank's does."""
        ...

    def predict(self, conversations: Sequence[Sample], progress: "Progress") -> list[TeacherRows]:
        """The records of some conversations, in their order; [] on a rank that does not write."""
        ...


@dataclass
class Progress:
    """A bar over supervised tokens of all shards that are missing, with speed, time left and bytes
    written."""

    bar: tqdm
    ranks: int
    written: int = 0

    def tokens(self, count: int) -> None:
        """`count` supervised tokens more are computed on this rank; the others are as fast."""
        self.bar.update(min(count * self.ranks, (self.bar.total or 0) - self.bar.n))

    def wrote(self, size: int) -> None:
        """A shard was written here."""
        self.written += size * self.ranks
        self.bar.set_postfix_str(f"{self.written / 2**20:.1f} MiB", refresh=False)


def fill_cache(
    writer: CacheWriter,
    predictor: Predictor,
    missing: Sequence[int] | None = None,
    *,
    progress: bool,
) -> int:
    """Compute and write this rank's share of the missing shards; how many supervised tokens that
    were.

    missing: the same on all ranks; None looks for them.
    """
    plan, share = writer.plan, predictor.share
    missing = writer.missing() if missing is None else list(missing)
    # by number, not by place in the list: a rank that is
    # late finds shards of the others' there already
    mine, done = [number for number in missing if number % share.ranks == share.rank], 0
    tokens = np.add.reduceat(plan.supervised, plan.starts[:-1])
    total = int(tokens[missing].sum()) if missing else 0
    with tqdm(
        total=total,
        unit="tok",
        unit_scale=True,
        desc="teacher",
        file=sys.stderr,
        disable=not progress,
    ) as bar:
        counter = Progress(bar, share.ranks)
        for number in mine:
            members = range(plan.starts[number], plan.starts[number + 1])
            samples = [plan.data[plan.of[i]].row(int(plan.row[i])) for i in members]
            records = predictor.predict(samples, counter)
            size = expected_bytes(len(samples), int(tokens[number]), writer.identity.top_k)
            counter.wrote(writer.write_shard(number, records) if predictor.writes else size)
            done += int(tokens[number])
    return done


def as_rows(records: TeacherRecords[Tensor], counts: Sequence[int]) -> list[TeacherRows]:
    """Records of consecutive conversations with `counts` supervised tokens each, rounded to the
    cache's types.

    records: of all of them, as `teacher_topk` gives them.
    """
    arrays = records.map(lambda x: x.cpu().numpy())
    ids = arrays.ids.astype(np.int32)
    # a log-prob is at most 0, and one that fp16 cannot hold is
    # as good as its smallest number; -inf is no token at all
    logprobs = np.clip(arrays.logprobs, FLOAT16_MIN, 0).astype(np.float16)
    logprobs[ids < 0] = -np.inf
    label = np.clip(arrays.label_logp, FLOAT16_MIN, 0).astype(np.float16)
    tail = np.minimum(arrays.tail_logmass, 0).astype(np.float32)
    rounded = TeacherRecords(ids, logprobs, label, tail)
    ends = np.cumsum(counts).tolist()
    return [rounded.map(lambda x, a=a, b=b: x[a:b]) for a, b in zip([0, *ends], ends, strict=False)]
