"""A job that was killed goes on where it stopped: the cache is that of one that was not, and
nothing is done twice."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_tsft.errors import UserError
from megatron_tsft.teacher.format import CARD_FILE, PLAN_FILE, shard_name
from megatron_tsft.teacher.job import Share, fill_cache
from megatron_tsft.teacher.plan import plan_cache
from megatron_tsft.teacher.reader import TeacherCache
from megatron_tsft.teacher.request import Question
from megatron_tsft.teacher.transformers_teacher import TransformersTeacher
from megatron_tsft.teacher.writer import CacheWriter
from tests.ports import free_port
from tests.ranks import run_ranks
from tests.teacher.caches import contents, identity, load_tool, prepared, shard_records, write_cache
from tests.teacher.conftest import Home
from tests.training.runs import REPOSITORY

K, SHARD_BYTES = 4, 3000
TOOL = load_tool("cache_teacher")


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def shards(directory: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of every finished shard."""
    paths = directory.glob("shard-*.arrow")
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in paths}


def kill_at(line: list[str], directory: Path, count: int, wait: float) -> None:
    """Start the tool and end it with SIGKILL `wait` seconds after it has written `count` shards
    more."""
    environment = os.environ | {
        "PYTHONPATH": str(REPOSITORY),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    count += len(shards(directory))
    process = subprocess.Popen(
        line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    try:
        while process.poll() is None and len(shards(directory)) < count:
            time.sleep(0.001)
        time.sleep(wait)
        ended = process.poll()
    finally:
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
        said = process.communicate()
    assert ended is None, said


@pytest.mark.slow
def test_a_job_that_is_killed_three_times_makes_the_same_cache(
    home: Home, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # the tool sets it; undone afterwards
    data = prepared(home.root, "long", 400, 3)
    flags = [
        "--teacher",
        str(home.hf),
        "--data",
        str(data.directory),
        "--top-k",
        "4",
        "--shard-bytes",
        "3500",
    ]
    flags += [
        "--device",
        "cpu",
        "--no-progress",
        "--batch-tokens",
        "1",
    ]  # a conversation at a time: slow enough to hit
    assert TOOL.main([*flags, "--output", str(tmp_path / "whole")]) == 0
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert len(shards(whole)) >= 25

    draw, before = random.Random(7), {}
    line = [
        sys.executable,
        str(REPOSITORY / "tools" / "cache_teacher.py"),
        *flags,
        "--output",
        str(killed),
    ]
    for _ in range(3):
        kill_at(line, killed, draw.randint(1, 6), draw.uniform(0, 0.02))
        now = shards(killed)
        assert (
            not (killed / CARD_FILE).exists()
            and before.items() <= now.items()
            and len(now) > len(before)
        )
        with pytest.raises(UserError, match="is an unfinished teacher cache"):
            TeacherCache.load(killed)
        before = now
    (killed / f".{shard_name(len(shards(whole)) - 1)}.tmp").write_bytes(
        b"half a shard"
    )  # whatever moment was hit
    capsys.readouterr()
    assert TOOL.main([*flags, "--output", str(killed)]) == 0
    out = capsys.readouterr().out
    assert f"in {len(shards(whole))} shards, {len(before)} of them are there already" in out
    assert before.items() <= shards(killed).items()
    assert names(killed) == names(whole) == {CARD_FILE, PLAN_FILE, *shards(whole)}
    assert contents(killed) == contents(whole)
    assert len(contents(whole)) == len(data.sample_ids.unique())


def test_a_finished_cache_has_nothing_to_do(
    home: Home, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    flags = [
        "--teacher",
        str(home.hf),
        "--data",
        str(home.held.directory),
        "--output",
        str(tmp_path / "cache"),
    ]
    flags += ["--top-k", "4", "--device", "cpu", "--no-progress"]
    assert TOOL.main(flags) == 0

    def state() -> dict[str, tuple[int, int, int]]:
        """Inode, time and size of every file."""
        found = {path.name: path.stat() for path in (tmp_path / "cache").iterdir()}
        return {name: (stat.st_ino, stat.st_mtime_ns, stat.st_size) for name, stat in found.items()}

    files = state()
    capsys.readouterr()
    assert TOOL.main(flags) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'cache'} is finished already: nothing to do\n"
    assert files == state()
    assert TOOL.main([*flags, "--temperature", "2"]) == 2
    assert (
        "holds a teacher cache of another job (temperature 1.0, now 2.0)" in capsys.readouterr().err
    )


def test_what_a_killed_write_left_is_replaced(home: Home, tmp_path: Path) -> None:
    whole = write_cache(tmp_path / "whole", [home.train], K, SHARD_BYTES)
    plan = plan_cache([home.train], K, SHARD_BYTES)
    writer = CacheWriter(tmp_path / "cache", identity([home.train], K), plan)
    writer.begin()
    writer.write_shard(1, shard_records(plan, 1, K))
    for number in (0, 1):  # of a shard that is to be written again, and of one that is there
        (writer.directory / f".{shard_name(number)}.tmp").write_bytes(b"half a shard")
    again = CacheWriter(writer.directory, writer.identity, plan_cache([home.train], K, SHARD_BYTES))
    again.begin()
    assert again.missing() == [0, *range(2, plan.shards)] and not again.finished
    for number in again.missing():
        again.write_shard(number, shard_records(plan, number, K))
    assert not again.missing() and not again.finished
    again.finish()
    assert again.finished and names(writer.directory) == names(whole.directory)
    assert contents(writer.directory) == contents(whole.directory)


def test_a_deleted_shard_and_card_are_made_again(home: Home, tmp_path: Path) -> None:
    """What the message of a damaged shard tells its reader to do."""
    cache = write_cache(tmp_path / "cache", [home.train], K, SHARD_BYTES)
    before, untouched = contents(cache.directory), shards(cache.directory)
    (cache.directory / CARD_FILE).unlink()
    (cache.directory / shard_name(2)).unlink()
    write_missing = CacheWriter(
        cache.directory, cache.card.identity, plan_cache([home.train], K, SHARD_BYTES)
    )
    write_missing.begin()
    assert write_missing.missing() == [2]
    write_missing.write_shard(2, shard_records(write_missing.plan, 2, K))
    write_missing.finish()
    assert contents(cache.directory) == before
    del untouched[shard_name(2)]
    assert untouched.items() <= shards(cache.directory).items()


def cache_on_rank(rank: int, port: int, flags: list[str]) -> int:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return TOOL.main(flags)


@pytest.mark.slow
def test_ranks_share_the_shards_and_make_the_same_cache(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    flags = [
        "--teacher",
        str(home.hf),
        "--data",
        str(home.train.directory),
        str(home.both.directory),
        "--top-k",
        "4",
    ]
    flags += ["--device", "cpu", "--no-progress", "--shard-bytes", "4000", "--batch-tokens", "64"]
    for world in (1, 2, 3):
        port = free_port()
        output = ["--output", str(tmp_path / str(world))]
        assert run_ranks(world, cache_on_rank, port, [*flags, *output], group=False) == [0] * world
    one = contents(tmp_path / "1")
    assert len(shards(tmp_path / "1")) > 3
    for world in ("2", "3"):
        assert (
            names(tmp_path / world) == names(tmp_path / "1") and contents(tmp_path / world) == one
        )


def test_a_late_rank_has_the_share_of_one_in_time(home: Home, tmp_path: Path) -> None:
    plan = plan_cache([home.held], K, 500)
    assert plan.shards > 4
    writer = CacheWriter(tmp_path / "cache", identity([home.held], K), plan)
    writer.begin()
    for rank in (0, 1):
        question = Question(K, 1.0, writer.identity.vocab_size, None, batch_tokens=256)
        teacher = TransformersTeacher(home.hf, question, "fp32", "cpu", share=Share(rank, 2))
        fill_cache(writer, teacher, progress=False)
    assert writer.missing() == []


def test_other_shards_of_the_same_number_are_another_job(home: Home, tmp_path: Path) -> None:
    one = plan_cache([home.train], K, SHARD_BYTES)
    others = (plan_cache([home.train], K, SHARD_BYTES + more) for more in range(10, 800, 10))
    other = next(
        plan for plan in others if plan.shards == one.shards and (plan.starts != one.starts).any()
    )
    writer = CacheWriter(tmp_path / "cache", identity([home.train], K), one)
    writer.begin()
    for number in range(
        int((other.starts != one.starts).argmax())
    ):  # the last of them ends elsewhere
        writer.write_shard(number, shard_records(one, number, K))
    again = CacheWriter(writer.directory, writer.identity, other)
    try:
        again.begin()
    except UserError:
        return  # refused: as well
    for number in again.missing():
        again.write_shard(number, shard_records(other, number, K))
    again.finish()
    assert len(contents(again.directory)) == one.conversations


def test_killed_while_the_plan_is_written(home: Home, tmp_path: Path) -> None:
    writer = CacheWriter(tmp_path / "cache", identity([home.held], K), plan_cache([home.held], K))
    writer.directory.mkdir()
    (writer.directory / f".{PLAN_FILE}.4711.tmp").write_text(
        "{"
    )  # atomic.write_text, before its rename
    writer.begin()


def test_killed_while_the_card_is_written(home: Home, tmp_path: Path) -> None:
    cache = write_cache(tmp_path / "cache", [home.held], K)
    (cache.directory / CARD_FILE).rename(cache.directory / f".{CARD_FILE}.4711.tmp")
    CacheWriter(cache.directory, cache.card.identity, plan_cache([home.held], K)).finish()
    assert names(cache.directory) == {CARD_FILE, PLAN_FILE, *shards(cache.directory)}
