"""What is written is read again: rounded to fp16 as documented and no more, in few bytes, whoever
cached which data."""

from pathlib import Path

import numpy as np
import pyarrow.ipc
import pytest
import torch

from megatron_tsft.data.prepared import PreparedData
from megatron_tsft.loss.records import TeacherRecords
from megatron_tsft.teacher.format import CacheCard, expected_bytes
from megatron_tsft.teacher.job import as_rows
from megatron_tsft.teacher.plan import plan_cache
from megatron_tsft.teacher.reader import CachedTeacher, TeacherCache
from tests.teacher.caches import (
    VOCABULARY,
    contents,
    predictions,
    prepared,
    record,
    same,
    write_cache,
)
from tests.teacher.conftest import Home


def within_fp16(found: np.ndarray, exact: torch.Tensor) -> bool:
    """Rounded to nearest: half of 2^-10 relative, and half of the smallest number, 2^-24, near
    0."""
    bound = np.maximum(np.abs(exact.numpy()) * 2**-11, 2**-25)
    return bool((np.abs(found.astype(np.float64) - exact.numpy()) <= bound).all())


def test_log_probs_are_rounded_to_fp16_and_tails_to_fp32(home: Home, tmp_path: Path) -> None:
    k = 8
    teacher = CachedTeacher([write_cache(tmp_path / "cache", [home.train], k, 3000)], home.train)
    supervised, smallest = home.train.supervised(), 0.0
    for i in range(len(home.train)):
        rows, exact = (
            teacher.rows(i),
            predictions(home.train.sample_ids[i].as_py(), int(supervised[i]), k),
        )
        assert (
            rows.ids.dtype == np.int32
            and rows.logprobs.dtype == rows.label_logp.dtype == np.float16
        )
        assert rows.tail_logmass.dtype == np.float32
        assert np.array_equal(rows.ids, exact.ids.numpy())
        assert within_fp16(rows.logprobs, exact.logprobs) and within_fp16(
            rows.label_logp, exact.label_logp
        )
        assert np.array_equal(rows.tail_logmass, exact.tail_logmass.float().numpy())
        smallest = min(smallest, float(rows.tail_logmass.min()))
    assert smallest < np.log(1e-7)  # some tails are smaller than what fp16 log-probs would sum to


def test_the_ends_of_fp16(home: Home, tmp_path: Path) -> None:
    """What is nearly 1, what no fp16 can hold, a label and a tail without mass, and fewer tokens
    than k."""
    inf = torch.inf
    topk = TeacherRecords(
        torch.tensor([[5, 3, 9], [7, -1, -1]]),
        torch.tensor([[-1e-9, -70000.0, -1e30], [2e-9, -inf, -inf]]),
        label_logp=torch.tensor([-inf, -1e-9]),
        tail_logmass=torch.tensor([-87.25, -inf]),
    )
    (rows,) = as_rows(topk, [2])
    lowest = np.finfo(np.float16).min
    assert rows.logprobs.tolist() == [[0, lowest, lowest], [0, -inf, -inf]]
    assert rows.label_logp.tolist() == [lowest, 0] and rows.tail_logmass.tolist() == [
        -87.25,
        -inf,
    ]
    parts = as_rows(topk, [1, 0, 1])
    assert [len(part) for part in parts] == [1, 0, 1] and parts[2].ids.tolist() == [[7, -1, -1]]


@pytest.fixture(scope="module")
def talk(home: Home) -> PreparedData:
    """Conversations of 60 to 80 supervised tokens."""
    data = prepared(home.root, "talk", 200, 5, words=(60, 80))
    assert data.supervised().min() >= 60
    return data


@pytest.mark.parametrize("k", [16, 64])
def test_bytes_on_disk(talk: PreparedData, tmp_path: Path, k: int) -> None:
    cache = write_cache(tmp_path / "cache", [talk], k)
    size = sum(path.stat().st_size for path in cache.directory.iterdir())  # the card too
    tokens = talk.card.supervised_tokens
    assert cache.card.tokens == tokens and len(cache.card.shards) > 3
    assert size <= 6.5 * tokens * k
    assert (
        0 <= size - expected_bytes(len(talk), tokens, k) < 0.02 * size
    )  # what the command announces


def test_equal_conversations_share_a_record(home: Home, tmp_path: Path) -> None:
    own = [
        name
        for name in home.both.sample_ids.to_pylist()
        if name not in home.held.sample_ids.to_pylist()
    ]
    assert len(own) == 9 and len(home.both) == 21
    cache = write_cache(tmp_path / "cache", [home.held, home.both], 4)
    assert cache.card.conversations == 12 + 9
    assert cache.card.tokens == home.both.card.supervised_tokens  # each of its conversations, once
    held, both = CachedTeacher([cache], home.held), CachedTeacher([cache], home.both)
    places = {name: i for i, name in enumerate(home.both.sample_ids.to_pylist())}
    for i, name in enumerate(home.held.sample_ids.to_pylist()):
        assert same(held.rows(i), both.rows(places[name]))


def test_the_order_and_the_grouping_of_data_do_not_change_a_record(
    home: Home, tmp_path: Path
) -> None:
    one = write_cache(tmp_path / "one", [home.held, home.both, home.train], 4, 2000)
    two = write_cache(tmp_path / "two", [home.train, home.both], 4, 5000)
    assert contents(one.directory) == contents(two.directory)
    assert len(one.card.shards) > len(two.card.shards)


def test_the_plan_covers_every_conversation_once(home: Home) -> None:
    data = [home.train, home.both, home.held]
    for shard_bytes in (1, 700, 3000, None):
        plan = plan_cache(data, 4, shard_bytes)
        names = [
            data[i].sample_ids[j].as_py()
            for i, j in zip(plan.of.tolist(), plan.row.tolist(), strict=True)
        ]
        first_seen = list(
            dict.fromkeys(name for part in data for name in part.sample_ids.to_pylist())
        )
        assert names == first_seen and plan.conversations == len(names)
        assert (
            plan.starts[0] == 0
            and plan.starts[-1] == len(names)
            and (np.diff(plan.starts) > 0).all()
        )
        rows = [data[i].row(j) for i, j in zip(plan.of.tolist(), plan.row.tolist(), strict=True)]
        assert plan.supervised.tolist() == [int(row.loss_mask.sum()) for row in rows]
        assert plan.lengths.tolist() == [len(row.input_ids) for row in rows]
        assert plan.tokens == int(plan.supervised.sum())
        for begin, end in zip(plan.starts, plan.starts[1:], strict=False):
            size = expected_bytes(int(end - begin), int(plan.supervised[begin:end].sum()), 4)
            assert shard_bytes is None or size <= shard_bytes or end - begin == 1
    assert plan_cache(data, 4, 1).shards == plan_cache(data, 4).conversations


def test_two_caches_cover_two_data_sets_together(home: Home, tmp_path: Path) -> None:
    caches = [
        write_cache(tmp_path / name, [data], 4)
        for name, data in (("a", home.train), ("b", home.both))
    ]
    for order in (caches, caches[::-1]):
        for data in (home.train, home.both, home.held):  # held is a part of both
            teacher = CachedTeacher(order, data)
            assert teacher.top_k == 4
            for i, n in enumerate(data.supervised().tolist()):
                assert same(teacher.rows(i), record(data.sample_ids[i].as_py(), n, 4))


def test_the_first_cache_that_has_a_conversation_is_asked(home: Home, tmp_path: Path) -> None:
    narrow, wide = (
        write_cache(tmp_path / "n", [home.held], 2),
        write_cache(tmp_path / "w", [home.both], 5),
    )
    for caches, known in (([narrow, wide], 2), ([wide, narrow], 5)):
        ids = CachedTeacher(caches, home.held).rows(0).ids
        assert ids.shape[1] == 5 and ((ids >= 0).sum(1) == known).all()


def test_a_narrower_cache_is_padded(home: Home, tmp_path: Path) -> None:
    narrow, wide = (
        write_cache(tmp_path / "n", [home.held], 3),
        write_cache(tmp_path / "w", [home.both], 8),
    )
    teacher = CachedTeacher([narrow, wide], home.both)
    assert teacher.top_k == 8
    for i, n in enumerate(home.both.supervised().tolist()):
        name, rows = home.both.sample_ids[i].as_py(), teacher.rows(i)
        if i < 9:  # its own come first
            assert same(rows, record(name, n, 8))
            continue
        three = record(name, n, 3)
        assert rows.ids.dtype == np.int32 and rows.logprobs.dtype == np.float16
        assert np.array_equal(rows.ids[:, :3], three.ids) and (rows.ids[:, 3:] == -1).all()
        assert (
            np.array_equal(rows.logprobs[:, :3], three.logprobs)
            and np.isneginf(rows.logprobs[:, 3:]).all()
        )
        assert np.array_equal(rows.tail_logmass, three.tail_logmass)  # of the cache's own k
        assert np.array_equal(rows.label_logp, three.label_logp)


def test_the_card_counts_what_the_shards_hold(home: Home, tmp_path: Path) -> None:
    cache = write_cache(tmp_path / "cache", [home.train], 4, 2000)
    assert CacheCard.load(cache.directory) == cache.card
    tokens = 0
    for name, facts in cache.card.shards.items():
        path = cache.directory / name
        with pyarrow.ipc.open_file(str(path)) as file:
            table = file.read_all()
        assert facts["conversations"] == table.num_rows and facts["bytes"] == path.stat().st_size
        tokens += sum(len(row) for row in table["tokens"].to_pylist())
    assert tokens == cache.card.tokens == len(cache.tail_logmass())
    assert (
        sum(facts["conversations"] for facts in cache.card.shards.values())
        == cache.card.conversations
    )
    read: list[int] = []
    TeacherCache.load(cache.directory).verify(read.append)
    assert read == [facts["bytes"] for facts in cache.card.shards.values()]


def test_a_cache_of_the_whole_vocabulary_has_no_tail(home: Home, tmp_path: Path) -> None:
    cache = write_cache(tmp_path / "cache", [home.held], VOCABULARY)
    cache.verify()
    assert np.isneginf(cache.tail_logmass()).all()
    assert np.array_equal(np.sort(cache.record(0).ids, axis=1)[0], np.arange(VOCABULARY))
