"""What the tests of teacher caches share: prepared conversations, seeded records, and everything
that a folder says."""

import dataclasses
import importlib.util
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from megatron_tsft.data.prepare import prepare
from megatron_tsft.data.prepared import PreparedData
from megatron_tsft.data.teacher_rows import TeacherRows
from megatron_tsft.loss.records import TeacherRecords
from megatron_tsft.teacher.format import CARD_FILE, CacheIdentity, schema
from megatron_tsft.teacher.job import as_rows
from megatron_tsft.teacher.plan import CachePlan, plan_cache
from megatron_tsft.teacher.reader import TeacherCache
from megatron_tsft.teacher.writer import CacheWriter, file_digest
from tests.training.runs import MODEL, REPOSITORY, WORDS

VOCABULARY = int(MODEL["vocab_size"])


def load_tool(name: str) -> ModuleType:
    """tools/{name}.py as a module."""
    spec = importlib.util.spec_from_file_location(name, REPOSITORY / "tools" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def prepared(
    root: Path,
    name: str,
    count: int,
    seed: int,
    *,
    words: tuple[int, int] = (3, 14),
    again: Sequence[str] = (),
) -> PreparedData:
    """root/name: `count` random conversations of a word-level tokenizer at root/hf, then those of
    other names again."""
    draw, lines = random.Random(seed), []
    for _ in range(count):
        text = " ".join(f"w{draw.randrange(WORDS)}" for _ in range(draw.randint(*words)))
        start = draw.randrange(WORDS)
        lines.append(
            json.dumps(
                {"prompt": f"w{start} plus w{draw.randrange(WORDS)} is", "completion": f" {text}"}
            )
        )
    for other in again:
        lines += (root / f"{other}.jsonl").read_text().splitlines()
    (root / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    prepare(root / f"{name}.jsonl", root / "hf", root / name, progress=False)
    return PreparedData.load(root / name)


def predictions(sample_id: str, tokens: int, k: int) -> TeacherRecords[torch.Tensor]:
    """What a teacher says of a conversation, fp64: a function of its sample_id and k; sure of every
    other token."""
    generator = torch.Generator().manual_seed(int(sample_id[:8], 16))
    logits = 3 * torch.randn(tokens, VOCABULARY, generator=generator, dtype=torch.float64)
    logits[::2, 0] += 25
    log_t = torch.log_softmax(logits, -1)
    ordered, ids = log_t.sort(-1, descending=True)
    label = log_t.gather(1, torch.randint(VOCABULARY, (tokens, 1), generator=generator))[:, 0]
    tail = (
        torch.logsumexp(ordered[:, k:], -1) if k < VOCABULARY else torch.full((tokens,), -torch.inf)
    )
    return TeacherRecords(ids[:, :k], ordered[:, :k], label_logp=label, tail_logmass=tail)


def record(sample_id: str, tokens: int, k: int) -> TeacherRows:
    """`predictions` as the cache rounds them."""
    return as_rows(predictions(sample_id, tokens, k), [tokens])[0]


def identity(data: Sequence[PreparedData], k: int, **changes: Any) -> CacheIdentity:
    """Of a cache of these data sets."""
    names = [part.card.fingerprint for part in data]
    made = CacheIdentity(
        "teacher", "0" * 16, data[0].card.tokenizer_fingerprint, VOCABULARY, k, 1.0, "fp32", names
    )
    return dataclasses.replace(made, **changes)


def shard_records(plan: CachePlan, number: int, k: int) -> list[TeacherRows]:
    """`record` of each conversation of a shard."""
    members = range(plan.starts[number], plan.starts[number + 1])
    names = [plan.data[plan.of[i]].sample_ids[int(plan.row[i])].as_py() for i in members]
    return [
        record(name, int(plan.supervised[i]), k) for name, i in zip(names, members, strict=True)
    ]


def write_cache(
    directory: Path, data: Sequence[PreparedData], k: int, shard_bytes: int | None = None
) -> TeacherCache:
    """A finished cache of `record`s."""
    plan = plan_cache(data, k, shard_bytes)
    writer = CacheWriter(directory, identity(data, k), plan)
    writer.begin()
    for number in range(plan.shards):
        writer.write_shard(number, shard_records(plan, number, k))
    writer.finish()
    return TeacherCache.load(directory)


def rewrite_shard(
    directory: Path, name: str, change: Callable[[list[dict[str, Any]]], Any]
) -> None:
    """Write a shard again after `change` of its rows, and its facts in the card: as a faulty
    program would have."""
    card = json.loads((directory / CARD_FILE).read_text())
    path = directory / name
    with pa.OSFile(str(path)) as source:
        rows = pa.ipc.open_file(source).read_all().to_pylist()
    change(rows)
    table = pa.Table.from_pylist(rows, schema(card["identity"]["top_k"]))
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_batch(table.combine_chunks().to_batches()[0])
    card.pop("checksum", None)
    card["shards"][name] |= {"bytes": path.stat().st_size, "sha256": file_digest(path)}
    (directory / CARD_FILE).write_text(json.dumps(card))


def as_bytes(rows: TeacherRows) -> bytes:
    """Every bit of a record, with its types and shapes."""
    parts = (rows.ids, rows.logprobs, rows.label_logp, rows.tail_logmass)
    return b"".join(
        f"{part.dtype}{part.shape}".encode() + np.ascontiguousarray(part).tobytes()
        for part in parts
    )


def contents(directory: Path) -> dict[str, bytes]:
    """All records of a finished cache that verifies, by sample_id; none is there twice."""
    cache = TeacherCache.load(directory)
    cache.verify()
    found = {key.as_py().hex(): as_bytes(cache.record(i)) for i, key in enumerate(cache.keys)}
    assert len(found) == len(cache.keys) == cache.card.conversations
    return found


def same(one: TeacherRows, two: TeacherRows) -> bool:
    """Whether two records are equal to the last bit."""
    return as_bytes(one) == as_bytes(two)
