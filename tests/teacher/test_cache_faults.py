"""What is wrong with a cache is said by name, with what to do, before anything trains; nothing
damaged is ever read."""

import dataclasses
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_tsft.data.teacher_rows import TeacherRows
from megatron_tsft.errors import UserError
from megatron_tsft.teacher.format import CARD_FILE, PLAN_FILE
from megatron_tsft.teacher.plan import plan_cache
from megatron_tsft.teacher.reader import CachedTeacher, TeacherCache
from megatron_tsft.teacher.tokens import check_same_tokenizer, read_token_map
from megatron_tsft.teacher.writer import CacheWriter
from tests.teacher.caches import VOCABULARY, identity, rewrite_shard, shard_records, write_cache
from tests.teacher.conftest import Home

K, SHARD = 4, "shard-00001.arrow"
SHARD_BYTES = 3000  # several shards
AGAIN = "copy the cache again, or delete this shard, its card and rerun"


@pytest.fixture(scope="module")
def whole(home: Home, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("caches") / "whole"
    assert len(write_cache(directory, [home.train], K, SHARD_BYTES).card.shards) > 3
    return directory


@pytest.fixture
def cache(whole: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(whole, tmp_path / "cache"))


def change_card(directory: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    card = json.loads((directory / CARD_FILE).read_text())
    del card["checksum"]  # a program that wrote this would have made another
    change(card)
    (directory / CARD_FILE).write_text(json.dumps(card))


def test_a_flipped_byte_is_found_by_the_checksum(cache: Path) -> None:
    content = bytearray((cache / SHARD).read_bytes())
    content[len(content) // 2] ^= 1
    (cache / SHARD).write_bytes(content)
    with pytest.raises(UserError, match=rf"{SHARD} is damaged \(its checksum differs\): .*{AGAIN}"):
        TeacherCache.load(cache).verify()


def test_no_flipped_bit_passes_anywhere(cache: Path) -> None:
    """Also in Arrow's own structure, where the shard cannot be opened at all."""
    content, draw = (cache / SHARD).read_bytes(), random.Random(0)
    structure = [draw.randrange(len(content) - 1200, len(content)) for _ in range(100)]
    for place in [
        *range(0, 700, 7),
        *structure,
        *(draw.randrange(len(content)) for _ in range(50)),
    ]:
        damaged = bytearray(content)
        damaged[place] ^= 1 << draw.randrange(8)
        (cache / SHARD).unlink()  # another file: the old one may still be mapped
        (cache / SHARD).write_bytes(damaged)
        with pytest.raises(UserError, match=SHARD):
            TeacherCache.load(cache).verify()


def test_a_missing_shard_is_named(cache: Path) -> None:
    (cache / SHARD).unlink()
    with pytest.raises(UserError, match=f"{SHARD} is missing: .*{AGAIN}"):
        TeacherCache.load(cache)


@pytest.mark.parametrize("cut", [1, 1000])
def test_a_truncated_shard_is_named(cache: Path, cut: int) -> None:
    size = (cache / SHARD).stat().st_size
    (cache / SHARD).write_bytes((cache / SHARD).read_bytes()[:-cut])
    with pytest.raises(
        UserError, match=f"{SHARD} has {size - cut} bytes instead of {size}: .*{AGAIN}"
    ):
        TeacherCache.load(cache)


def test_a_shard_of_another_cache_is_refused(cache: Path) -> None:
    """It has the shape of the right one, and the card vouches for it; its conversations are there
    twice."""
    card = json.loads((cache / CARD_FILE).read_text())
    del card["checksum"]
    card["shards"][SHARD] = card["shards"]["shard-00000.arrow"]
    shutil.copy(cache / "shard-00000.arrow", cache / SHARD)
    card["conversations"] = sum(facts["conversations"] for facts in card["shards"].values())
    (cache / CARD_FILE).write_text(json.dumps(card))
    with pytest.raises(UserError, match=f"does not hold the {card['conversations']} conversations"):
        TeacherCache.load(cache)


def test_without_a_card_it_is_no_cache_and_with_a_plan_an_unfinished_one(
    cache: Path, tmp_path: Path
) -> None:
    (cache / CARD_FILE).unlink()
    with pytest.raises(
        UserError, match="is an unfinished teacher cache: run tools/cache_teacher.py as before, it"
    ):
        TeacherCache.load(cache)
    (cache / PLAN_FILE).unlink()
    for folder in (cache, tmp_path / "nowhere"):
        with pytest.raises(
            UserError, match=rf"{folder} has no {CARD_FILE}: make the cache with .*cache_teacher.py"
        ):
            TeacherCache.load(folder)


def test_a_card_of_another_version_or_a_damaged_one(cache: Path) -> None:
    def of(change: Callable[[dict[str, Any]], Any], match: str) -> None:
        before = (cache / CARD_FILE).read_text()
        change_card(cache, change)
        with pytest.raises(UserError, match=match):
            TeacherCache.load(cache)
        (cache / CARD_FILE).write_text(before)

    of(
        lambda card: card.update(format_version=2),
        "not a teacher cache card of this version .*make the cache again",
    )
    of(
        lambda card: card.pop("shards") and card.update(pieces={}),
        "not a teacher cache card of this version",
    )
    of(
        lambda card: card["identity"].update(flavour="mint"),
        "identity.flavour='mint': .*make the cache again",
    )
    of(lambda card: card["identity"].pop("top_k"), "identity.top_k=None: .*make the cache again")
    of(
        lambda card: card["identity"].update(top_k=5),
        f"(?s)shard-00000.arrow cannot be read .*{AGAIN}",
    )
    of(
        lambda card: card["shards"][SHARD].update(conversations=1),
        f"{SHARD} holds .* instead of 1: .*{AGAIN}",
    )
    (cache / CARD_FILE).write_text("{")
    with pytest.raises(UserError, match="tsft_teacher.json is damaged .*make the cache again"):
        TeacherCache.load(cache)


def test_a_card_that_lacks_a_shards_facts(cache: Path) -> None:
    change_card(cache, lambda card: card["shards"][SHARD].pop("bytes"))
    with pytest.raises(UserError, match="make the cache again"):
        TeacherCache.load(cache)


def test_a_damaged_plan_is_named(writer: CacheWriter) -> None:
    (writer.directory / PLAN_FILE).write_text("{")
    with pytest.raises(UserError, match=PLAN_FILE):
        writer.begin()


def test_a_shard_of_another_layout_is_refused_in_one_line(cache: Path) -> None:
    change_card(cache, lambda card: card["identity"].update(top_k=5))
    with pytest.raises(UserError, match="shard-00000.arrow cannot be read") as refused:
        TeacherCache.load(cache)
    assert "\n" not in str(refused.value)


def test_a_cache_of_other_data_says_how_much_is_missing_and_where_it_begins(
    home: Home, whole: Path
) -> None:
    cache = TeacherCache.load(whole)
    with pytest.raises(UserError) as refused:
        CachedTeacher([cache], home.held)
    text, first = str(refused.value), home.held.sample_ids[0].as_py()
    assert (
        f"{whole} was made for another data set: it has no record of 12 of the 12 conversations"
        in text
    )
    assert (
        f"of {home.held.directory} (the first: {first}): make one with tools/cache_teacher.py"
        " --data" in text
    )


def test_a_cache_of_a_part_names_the_first_that_it_lacks(home: Home, tmp_path: Path) -> None:
    held = write_cache(tmp_path / "cache", [home.held], K)
    own = [i for i in range(len(home.both)) if held.find(home.both)[i] < 0]
    first = home.both.sample_ids[own[0]].as_py()
    with pytest.raises(
        UserError, match=rf"no record of {len(own)} of the {len(home.both)} .*the first: {first}"
    ):
        CachedTeacher([held], home.both)
    assert len(own) == 9


def test_another_tokenizer_is_refused(home: Home, cache: Path) -> None:
    change_card(cache, lambda card: card["identity"].update(tokenizer_fingerprint="f" * 16))
    ours = home.train.card.tokenizer_fingerprint
    with pytest.raises(
        UserError,
        match=rf"another tokenizer \(fingerprint f{{16}}\) than .*{ours}.*make a cache of",
    ):
        CachedTeacher([TeacherCache.load(cache)], home.train)
    check_same_tokenizer("teacher", ours, [home.train, home.held], "pass a --token-map")
    for theirs, match in (
        ("f" * 16, r"another tokenizer \(fingerprint f{16}\)"),
        (None, "no tokenizer"),
    ):
        with pytest.raises(
            UserError, match=f"the teacher 70b has {match}.*{ours}.*or pass a --token-map"
        ):
            check_same_tokenizer("70b", theirs, [home.train], "pass a --token-map")


def twice(ids: Any) -> None:
    ids[2][3] = ids[2][1]


def outside(ids: Any) -> None:
    ids[1][0] = VOCABULARY


def below(ids: Any) -> None:
    ids[1][0] = -2


IMPOSSIBLE = {
    "twice": (twice, "has the top-k id [0-9]+ twice"),
    "outside": (outside, f"has token id {VOCABULARY}, outside the vocabulary of {VOCABULARY}"),
    "below": (below, f"has token id -2, outside the vocabulary of {VOCABULARY}"),
}


def a_record(writer: CacheWriter) -> tuple[list[TeacherRows], int]:
    """A shard's records, and which of them has tokens enough to be spoilt."""
    records = shard_records(writer.plan, 0, K)
    return records, next(i for i, rows in enumerate(records) if len(rows) > 3)


@pytest.fixture
def writer(home: Home, tmp_path: Path) -> CacheWriter:
    writer = CacheWriter(
        tmp_path / "new", identity([home.train], K), plan_cache([home.train], K, SHARD_BYTES)
    )
    writer.begin()
    return writer


@pytest.mark.parametrize("fault", IMPOSSIBLE)
def test_impossible_ids_are_not_written(writer: CacheWriter, fault: str) -> None:
    change, match = IMPOSSIBLE[fault]
    records, i = a_record(writer)
    ids = records[i].ids.copy()
    change(ids)
    records[i] = dataclasses.replace(records[i], ids=ids)
    name = writer.plan.data[0].sample_ids[int(writer.plan.row[i])].as_py()
    with pytest.raises(
        UserError, match=f"record of conversation {name} cannot be cached: .*{match}"
    ):
        writer.write_shard(0, records)
    assert [path.name for path in writer.directory.iterdir()] == [PLAN_FILE]


@pytest.mark.parametrize("fault", IMPOSSIBLE)
def test_impossible_ids_are_not_read(cache: Path, fault: str) -> None:
    """The shard is what its card says, so only its content can give it away."""
    change, match = IMPOSSIBLE[fault]

    def spoil(rows: list[dict[str, Any]]) -> None:
        tokens = next(row["tokens"] for row in rows if len(row["tokens"]) > 3)
        ids = [token["ids"] for token in tokens]
        change(ids)

    rewrite_shard(cache, SHARD, lambda rows: None)
    TeacherCache.load(cache).verify()  # writing it again is no fault
    rewrite_shard(cache, SHARD, spoil)
    with pytest.raises(
        UserError, match=f"{SHARD} holds a record that no teacher .*{match}; make the cache again"
    ):
        TeacherCache.load(cache).verify()


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        ("logprobs", np.nan, "a log-prob that is not finite or above 0"),
        ("logprobs", -np.inf, "a log-prob that is not finite or above 0"),
        ("logprobs", 0.5, "a log-prob that is not finite or above 0"),
        ("label_logp", np.nan, "its label_logp are NaN or above 0"),
        ("tail_logmass", np.nan, "its tail_logmass are NaN or above 0"),
        ("tail_logmass", 0.5, "its tail_logmass are NaN or above 0"),
    ],
)
def test_numbers_that_are_no_log_probs_are_not_written(
    writer: CacheWriter, name: str, value: float, match: str
) -> None:
    records, i = a_record(writer)
    values = getattr(records[i], name).copy()
    values[-1] = value
    records[i] = dataclasses.replace(records[i], **{name: values})
    with pytest.raises(UserError, match=f"cannot be cached: .*{match}"):
        writer.write_shard(0, records)


def test_records_of_another_shape_are_not_written(writer: CacheWriter) -> None:
    records, i = a_record(writer)
    rows = records[i]
    shorter = TeacherRows(
        rows.ids[1:], rows.logprobs[1:], rows.label_logp[1:], rows.tail_logmass[1:]
    )
    for wrong, match in (
        (shorter, "its ids are"),
        (dataclasses.replace(rows, logprobs=rows.logprobs[:, 1:]), "do not fit each other"),
        (dataclasses.replace(rows, tail_logmass=rows.tail_logmass[1:]), "do not fit each other"),
    ):
        with pytest.raises(UserError, match=f"cannot be cached: .*{match}"):
            writer.write_shard(0, [*records[:i], wrong, *records[i + 1 :]])


def test_records_of_another_k_are_not_written(writer: CacheWriter) -> None:
    narrow = [
        TeacherRows(r.ids[:, 1:], r.logprobs[:, 1:], r.label_logp, r.tail_logmass)
        for r in a_record(writer)[0]
    ]
    with pytest.raises(UserError, match="cannot be cached"):
        writer.write_shard(0, narrow)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("teacher_hash", "1" * 16),
        ("tokenizer_fingerprint", "1" * 16),
        ("vocab_size", 66),
        ("top_k", 5),
        ("temperature", 0.5),
        ("dtype", "bf16"),
        ("data", ["1" * 32]),
        ("token_map", "1" * 16),
    ],
)
def test_the_folder_of_another_job_is_not_touched(
    writer: CacheWriter, name: str, value: Any
) -> None:
    before = (writer.directory / PLAN_FILE).read_bytes()
    other = CacheWriter(
        writer.directory, dataclasses.replace(writer.identity, **{name: value}), writer.plan
    )
    with pytest.raises(UserError) as refused:
        other.begin()
    text = str(refused.value)
    assert f"{writer.directory} holds a teacher cache of another job ({name} " in text
    assert f"now {value})" in text and text.endswith("name another --output")
    assert (writer.directory / PLAN_FILE).read_bytes() == before
    writer.begin()  # its own job may go on


def test_a_folder_of_other_things_is_not_touched(writer: CacheWriter, tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("notes", "file"):
        other = CacheWriter(tmp_path / name, writer.identity, writer.plan)
        with pytest.raises(
            UserError, match="exists already and is no teacher cache: name another --output"
        ):
            other.begin()
    assert [path.name for path in (tmp_path / "notes").iterdir()] == ["a.txt"]
    (tmp_path / "empty").mkdir()
    CacheWriter(tmp_path / "empty", writer.identity, writer.plan).begin()


def test_a_token_map_must_be_one(home: Home, tmp_path: Path) -> None:
    straight = list(range(VOCABULARY))
    file = tmp_path / "map.json"

    def read(values: Any) -> list[int]:
        file.write_text(values if isinstance(values, str) else json.dumps(values))
        return read_token_map(str(file), VOCABULARY, 100, [home.held, home.train])

    def refused(values: Any, match: str) -> None:
        with pytest.raises(UserError, match=f"token map {file} {match}"):
            read(values)

    assert read(straight) == straight
    assert read([-1, *straight[1:]])[0] == -1  # <unk>, which the data does not use
    refused([*straight[:-1], 3], "names the teacher's token 3 twice: give it one counterpart")
    refused([*straight[:-1], 100], r"must be a JSON list .*from -1 \(none\) to 99")
    for wrong in (
        [*straight[:-1], -2],
        [*straight[:-1], 1.0],
        [*straight[:-1], "w1"],
        [True, *straight[2:]],
    ):
        refused(wrong, "must be a JSON list of the teacher's ids")
    refused(
        [*straight, 99],
        f"has {VOCABULARY + 1} entries, the student's vocabulary {VOCABULARY}: make them agree",
    )
    lost = int(home.held.row(0).input_ids[0])
    without = [-1 if token == lost else token for token in straight]
    refused(
        without, f"has no counterpart of token {lost}, which {home.held.directory} uses: add it"
    )
    refused(
        straight[:10],
        f"has no counterpart of token [0-9]+, which {home.held.directory} uses: add it",
    )
    refused([], "has no counterpart of token")
    refused({"w1": 1}, "cannot be read .*: pass a JSON list")
    refused("[1, 2", "cannot be read .*: pass a JSON list")
    file.unlink()
    with pytest.raises(UserError, match="cannot be read .*: pass a JSON list"):
        read_token_map(str(file), VOCABULARY, 100, [home.held])
