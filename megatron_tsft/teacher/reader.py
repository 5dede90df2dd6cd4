"""Reads teacher caches: memory-mapped, looked up by a prepared data set's rows, checked first."""

import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from megatron_tsft.data.prepared import PreparedData
from megatron_tsft.data.teacher_rows import TeacherRows
from megatron_tsft.errors import UserError
from megatron_tsft.inside import inside
from megatron_tsft.teacher.format import CacheCard, ShardFacts, sample_keys, schema
from megatron_tsft.teacher.writer import file_digest, wrong_rows

REMEDY = (
    "the copy is incomplete or the disk damaged it: copy the cache again, or delete this shard, its"
    " card and rerun"
)


class TeacherCache:
    """A cache folder. `load` checks its structure, `verify` every byte."""

    def __init__(self, directory: Path, card: CacheCard, batches: list[pa.RecordBatch]) -> None:
        self.directory, self.card = directory, card
        self._shards = [_rows_of(batch) for batch in batches]
        self._offsets = [batch.column("tokens").offsets.to_numpy() for batch in batches]
        self._starts = np.cumsum([0, *(batch.num_rows for batch in batches)])
        self.keys = pa.chunked_array(
            [batch.column("sample_id") for batch in batches], pa.binary(16)
        )

    @staticmethod
    def load(directory: Path | str) -> "TeacherCache":
        """Open a folder.

        Raises:
            UserError: no card, or a shard that is missing, cut short or not what the card says.
        """
        directory = Path(directory)
        card = CacheCard.load(directory)
        batches = [
            _open_shard(inside(directory, name), facts, card.identity.top_k)
            for name, facts in card.shards.items()
        ]
        cache = TeacherCache(directory, card, batches)
        tokens = sum(len(shard) for shard in cache._shards)
        if (len(cache.keys), len(cache.keys.unique()), tokens) != (
            card.conversations,
            card.conversations,
            card.tokens,
        ):
            raise UserError(
                f"{directory} does not hold the {card.conversations} conversations, {card.tokens}"
                f" tokens, of its card: {REMEDY}"
            )
        return cache

    @property
    def top_k(self) -> int:
        return self.card.identity.top_k

    def verify(
        self,
        progress: Callable[[int], Any] = lambda size: None,
        *,
        share: tuple[int, int] = (0, 1),
        vocab_size: int | None = None,
    ) -> None:
        """Read everything: checksums, ids inside the vocabulary, none twice in a record, finite
        log-probs.

        Args:
            progress: called with the bytes of each shard when it has been read.
            share: (i, n) reads every n-th shard from the i-th on.
            vocab_size: ids must lie below it (default: the cache's own).

        Raises:
            UserError: the first shard that is not what was written, by name.
        """
        with ThreadPoolExecutor() as pool:
            check = functools.partial(
                self._verify_shard,
                self.card.identity.vocab_size if vocab_size is None else vocab_size,
            )
            for size in pool.map(check, range(share[0], len(self._shards), share[1])):
                progress(size)

    def _verify_shard(self, vocab_size: int, number: int) -> int:
        name, facts = list(self.card.shards.items())[number]
        path = self.directory / name
        if file_digest(path) != facts["sha256"]:
            raise UserError(f"{path} is damaged (its checksum differs): {REMEDY}")
        wrong = wrong_rows(self._shards[number], vocab_size)
        if wrong and vocab_size < self.card.identity.vocab_size:
            raise UserError(
                f"{path} holds a record that does not fit: {wrong}; cache with --vocab-size"
                f" {vocab_size}"
            )
        if wrong:
            raise UserError(
                f"{path} holds a record that no teacher can have written: {wrong}; make the cache"
                " again"
            )
        return int(facts["bytes"])

    def find(self, data: PreparedData) -> np.ndarray:
        """[rows of data] int64: each conversation's place in the cache, -1 where it has none."""
        places = pc.index_in(sample_keys(data.sample_ids), self.keys)  # pyright: ignore[reportAttributeAccessIssue]
        return pc.fill_null(places, -1).to_numpy().astype(np.int64)

    def record(self, place: int) -> TeacherRows:
        """The record at `place`; views of the file."""
        number = int(np.searchsorted(self._starts, place, side="right")) - 1
        begin, end = self._offsets[number][place - int(self._starts[number]) :][:2].tolist()
        return self._shards[number].map(lambda x: x[begin:end])

    def tail_logmass(self) -> np.ndarray:
        """[tokens] fp32, of the whole cache."""
        return np.concatenate([shard.tail_logmass for shard in self._shards])


class CachedTeacher:
    """One prepared data set's records, by its row numbers, from one cache or several."""

    def __init__(self, caches: Sequence[TeacherCache], data: PreparedData) -> None:
        """Raises UserError for a conversation that is in no cache, or another tokenizer."""
        self._caches, self._data = list(caches), data
        self._cache = np.full(len(data), -1)
        self._place = np.full(len(data), -1, np.int64)
        for i, cache in enumerate(caches):
            identity = cache.card.identity
            if identity.tokenizer_fingerprint != data.card.tokenizer_fingerprint:
                raise UserError(
                    f"{cache.directory} was made with another tokenizer (fingerprint"
                    f" {identity.tokenizer_fingerprint}) than {data.directory}"
                    f" ({data.card.tokenizer_fingerprint}): make a cache of this data"
                )
            places = cache.find(data)
            new = (places >= 0) & (self._cache < 0)
            self._cache[new], self._place[new] = i, places[new]
        lost = np.flatnonzero(self._cache < 0)
        if len(lost):
            names = ", ".join(str(cache.directory) for cache in caches)
            known = any(data.card.fingerprint in cache.card.identity.data for cache in caches)
            why = "" if known else "was made for another data set: it "
            raise UserError(
                f"the teacher cache {names} {why}has no record of {len(lost)} of the {len(data)}"
                f" conversations of {data.directory} (the first:"
                f" {data.sample_ids[int(lost[0])].as_py()}): make one with tools/cache_teacher.py"
                f" --data {data.directory}, which may name several data sets"
            )

    @property
    def top_k(self) -> int:
        """k of every record: the largest of the caches' (narrower records are padded)."""
        return max(cache.top_k for cache in self._caches)

    def __reduce__(self) -> tuple[Any, ...]:
        return _open_again, ([cache.directory for cache in self._caches], self._data)

    def rows(self, index: int) -> TeacherRows:
        """The records of conversation `index`."""
        rows = self._caches[self._cache[index]].record(int(self._place[index]))
        missing = self.top_k - rows.ids.shape[1]
        if not missing:
            return rows
        ids = np.pad(rows.ids, ((0, 0), (0, missing)), constant_values=-1)
        logprobs = np.pad(rows.logprobs, ((0, 0), (0, missing)), constant_values=-np.inf)
        return replace(rows, ids=ids, logprobs=logprobs)


def _open_again(directories: list[Path], data: PreparedData) -> CachedTeacher:
    return CachedTeacher([TeacherCache.load(directory) for directory in directories], data)


def _open_shard(path: Path, facts: ShardFacts, top_k: int) -> pa.RecordBatch:
    """A shard's one batch, memory-mapped."""
    on_disk = path.stat().st_size if path.is_file() else None
    if on_disk != facts["bytes"]:
        state = (
            "is missing" if on_disk is None else f"has {on_disk} bytes instead of {facts['bytes']}"
        )
        raise UserError(f"{path} {state}: {REMEDY}")
    try:
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        if reader.schema != schema(top_k) or reader.num_record_batches != 1:
            raise ValueError(f"its layout is not the one of a top-{top_k} cache")
        batch = reader.get_batch(0)
        batch.validate()
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): {REMEDY}") from error
    if batch.num_rows != facts["conversations"]:
        raise UserError(
            f"{path} holds {batch.num_rows} conversations instead of {facts['conversations']}:"
            f" {REMEDY}"
        )
    return batch


def _rows_of(batch: pa.RecordBatch) -> TeacherRows:
    """All records of a shard, one conversation after the other; views of the file."""
    tokens = batch.column("tokens").flatten()

    def matrix(name: str) -> np.ndarray:
        rows = tokens.field(name)
        return rows.flatten().to_numpy().reshape(len(tokens), rows.type.list_size)

    return TeacherRows(
        ids=matrix("ids"),
        logprobs=matrix("logprobs"),
        label_logp=tokens.field("label_logprob").to_numpy(),
        tail_logmass=tokens.field("tail_logmass").to_numpy(),
    )
