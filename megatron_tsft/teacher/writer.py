"""Writes a cache shard by shard, each whole or not there: a killed job goes on where it stopped."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa

from megatron_tsft.atomic import fsync_path, write_text
from megatron_tsft.data.prepared import PreparedData
from megatron_tsft.data.teacher_rows import TeacherRows
from megatron_tsft.errors import UserError
from megatron_tsft.lock import INSIDE
from megatron_tsft.plain_json import read_object
from megatron_tsft.teacher.format import (
    CARD_FILE,
    PLAN_FILE,
    CacheCard,
    CacheIdentity,
    ShardFacts,
    sample_keys,
    schema,
    shard_name,
)
from megatron_tsft.teacher.plan import CachePlan


class CacheWriter:
    """One rank's view of a cache that is being written; other ranks write other shards."""

    def __init__(self, directory: Path | str, identity: CacheIdentity, plan: CachePlan) -> None:
        self.directory, self.identity, self.plan = Path(directory), identity, plan

    def begin(self) -> None:
        """Make the folder and its plan, or find the unfinished one of the same job. One rank calls
        this, first.

        Raises:
            UserError: the folder holds something else.
        """
        job = dataclasses.asdict(self.identity) | {
            "shards": self.plan.shards,
            "borders": self.plan.borders,
        }
        path = self.directory / PLAN_FILE
        if path.is_file():
            earlier_job = read_object(path, f"delete {self.directory} and start again")
            different = [key for key in job if earlier_job.get(key) != job[key]]
            if different:
                what = "; ".join(
                    f"{key} {earlier_job.get(key)}, now {job[key]}" for key in different
                )
                raise UserError(
                    f"{self.directory} holds a teacher cache of another job ({what}): name another"
                    " --output"
                )
        elif self.directory.exists() and (not self.directory.is_dir() or self._strangers()):
            raise UserError(
                f"{self.directory} exists already and is no teacher cache: name another --output"
            )
        else:
            self.directory.mkdir(parents=True, exist_ok=True)
            write_text(path, json.dumps(job, indent=2) + "\n")
        self._sweep()

    def missing(self) -> list[int]:
        """Shards that are not there yet."""
        return [
            i for i in range(self.plan.shards) if not (self.directory / shard_name(i)).is_file()
        ]

    def write_shard(self, number: int, records: Sequence[TeacherRows]) -> int:
        """Write shard `number`, the records of its conversations in the plan's order; its bytes.

        Raises:
            UserError: a record is not what a teacher can say: the wrong shape, an id twice or
                outside the vocabulary, a log-prob that is not finite.
        """
        begin, end = self.plan.starts[number], self.plan.starts[number + 1]
        names = [self._sample_id(i) for i in range(begin, end)]
        for name, rows, n in zip(
            names, records, self.plan.supervised[begin:end].tolist(), strict=True
        ):
            if rows.ids.shape != (n, self.identity.top_k):
                wrong = f"its ids are {rows.ids.shape}, not {(n, self.identity.top_k)}"
            else:
                wrong = wrong_rows(rows, self.identity.vocab_size)
            if wrong:
                raise UserError(
                    f"the teacher's record of conversation {name} cannot be cached: {wrong}"
                )
        path = self.directory / shard_name(number)
        temporary = path.with_name(
            f".{path.name}.tmp"
        )  # a fixed name: the next try replaces what a killed one left
        batch = _batch(names, records)
        with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
            writer.write_batch(batch)
        fsync_path(temporary)
        os.replace(temporary, path)
        fsync_path(self.directory)
        return path.stat().st_size

    def finish(self) -> CacheCard:
        """Write the card. One rank calls this, when every shard is there."""
        names = [shard_name(i) for i in range(self.plan.shards)]
        if self.missing():
            raise UserError(
                f"{self.directory / shard_name(self.missing()[0])} is not there, though a rank"
                " wrote it: all ranks must see one --output folder; run the same command again"
            )
        with ThreadPoolExecutor() as pool:
            digests = list(pool.map(file_digest, [self.directory / name for name in names]))
        counts = np.diff(self.plan.starts).tolist()
        shards: dict[str, ShardFacts] = {
            name: {
                "bytes": (self.directory / name).stat().st_size,
                "sha256": digest,
                "conversations": count,
            }
            for name, digest, count in zip(names, digests, counts, strict=True)
        }
        card = CacheCard(self.identity, self.plan.conversations, self.plan.tokens, shards)
        card.save(self.directory)
        self._sweep()
        return card

    @property
    def finished(self) -> bool:
        """The cache was completed before."""
        return (self.directory / CARD_FILE).is_file()

    def _strangers(self) -> bool:
        """Whether the folder has files that no killed job of ours left."""
        return any(path not in self._temporary() for path in self.directory.iterdir())

    def _temporary(self) -> list[Path]:
        patterns = (INSIDE, ".shard-*.tmp", f".{PLAN_FILE}.*.tmp", f".{CARD_FILE}.*.tmp")
        return [path for pattern in patterns for path in self.directory.glob(pattern)]

    def _sweep(self) -> None:
        """Remove what a killed job left half-written; only while no other rank writes."""
        for path in self._temporary():
            if path.name != INSIDE:
                path.unlink()

    def _sample_id(self, index: int) -> str:
        data: PreparedData = self.plan.data[self.plan.of[index]]
        return data.sample_ids[int(self.plan.row[index])].as_py()


def file_digest(path: Path) -> str:
    """sha256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def wrong_rows(rows: TeacherRows, vocab_size: int) -> str | None:
    """What is impossible in records ([n, k] each, of one conversation or many), or None."""
    shapes = {rows.ids.shape, rows.logprobs.shape, (*rows.label_logp.shape, rows.ids.shape[1])}
    if len(shapes) != 1 or rows.label_logp.shape != rows.tail_logmass.shape:
        return (
            f"its arrays do not fit each other: {rows.ids.shape}, {rows.logprobs.shape},"
            f" {rows.tail_logmass.shape}"
        )
    if rows.ids.size and not -1 <= int(rows.ids.min()) <= int(rows.ids.max()) < vocab_size:
        outside = rows.ids[(rows.ids < -1) | (rows.ids >= vocab_size)]
        return f"it has token id {int(outside[0])}, outside the vocabulary of {vocab_size}"
    ordered = np.sort(rows.ids, axis=1)
    twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    if twice.any():
        token = int(np.flatnonzero(twice.any(1))[0])
        return (
            f"token {token} of it has the top-k id {int(ordered[token, 1:][twice[token]][0])} twice"
        )
    present = rows.ids >= 0
    if (
        not np.isfinite(rows.logprobs[present]).all()
        or (rows.logprobs[present] > 0).any()
        or not present[:, :1].all()
    ):
        return "it has a log-prob that is not finite or above 0"
    for name, values in (
        ("label_logp", rows.label_logp),
        ("tail_logmass", rows.tail_logmass),
    ):
        if np.isnan(values).any() or (values > 0).any():
            return f"its {name} are NaN or above 0"
    return None


def _batch(names: Sequence[str], records: Sequence[TeacherRows]) -> pa.RecordBatch:
    """The records as one Arrow batch."""
    top_k = records[0].ids.shape[1]
    layout = schema(top_k)
    offsets = pa.array(
        np.concatenate([[0], np.cumsum([len(rows) for rows in records])]).astype(np.int32)
    )

    def column(values: list[np.ndarray], kind: type) -> pa.Array:
        return pa.array(np.concatenate([v.reshape(-1) for v in values]).astype(kind))

    fields = [
        pa.FixedSizeListArray.from_arrays(column([rows.ids for rows in records], np.int32), top_k),
        pa.FixedSizeListArray.from_arrays(
            column([rows.logprobs for rows in records], np.float16), top_k
        ),
        column([rows.label_logp for rows in records], np.float16),
        column([rows.tail_logmass for rows in records], np.float32),
    ]
    item = layout.field("tokens").type.value_field.type
    tokens = pa.StructArray.from_arrays(fields, fields=list(item))
    lists = pa.ListArray.from_arrays(offsets, tokens, type=layout.field("tokens").type)
    return pa.record_batch([sample_keys(pa.chunked_array([pa.array(names)])), lists], schema=layout)
