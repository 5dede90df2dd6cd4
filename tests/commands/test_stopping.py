"""A run under torchrun that is asked to stop saves first, and the same command goes on."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from megatron_tsft.checkpoint.convert import import_hf
from megatron_tsft.data.prepare import prepare
from tests.training.runs import REPOSITORY, World, make_hf, under_torchrun, write_rows


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    world = World(tmp_path_factory.mktemp("stopping"))
    import_hf(make_hf(world.hf), world.base, progress=False)
    prepare(write_rows(world.root / "rows.jsonl", 60, 0), world.hf, world.train, progress=False)
    return world


class Job:
    """A training command under torchrun."""

    def __init__(self, world: World, save: Path, steps: int):
        layout = ("--pipeline-model-parallel-size", "2")
        words = under_torchrun(world.base, world.train, save, steps, *layout)
        environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
        self.metrics, self.output = save / "metrics.jsonl", save.with_suffix(".txt")
        with self.output.open("wb") as file:
            self.process = subprocess.Popen(
                words, env=environment, stdout=file, stderr=subprocess.STDOUT
            )
        self.ranks: list[psutil.Process] = []

    def steps(self) -> list[int]:
        if not self.metrics.is_file():
            return []
        lines = self.metrics.read_text().splitlines(keepends=True)
        return [json.loads(line)["step"] for line in lines if line.endswith("\n")]

    def wait_for_step(self, step: int) -> None:
        deadline = time.monotonic() + 120
        while not self.steps() or self.steps()[-1] < step:
            assert self.process.poll() is None, self.output.read_text()
            assert time.monotonic() < deadline, self.output.read_text()
            time.sleep(0.05)
        self.ranks = psutil.Process(self.process.pid).children(recursive=True)

    def end(self) -> tuple[int, str]:
        """(exit status, what was printed)."""
        status = self.process.wait(90)
        return status, self.output.read_text()

    def clean(self) -> None:
        for process in [*self.ranks, psutil.Process(self.process.pid)]:
            if process.is_running():
                process.kill()
        self.process.wait()


@pytest.fixture
def jobs() -> Iterator[list[Job]]:
    started: list[Job] = []
    yield started
    for job in started:
        if job.process.poll() is None:
            job.clean()


@pytest.mark.slow
def test_each_way_to_stop_saves_and_the_same_command_goes_on(
    world: World, tmp_path: Path, jobs: list[Job]
) -> None:
    save, seen = tmp_path / "run", 0
    ways = ("SIGTERM", "SIGINT", "a rank alone", "torchrun killed")
    for way in ways:
        job = Job(world, save, 4000)
        jobs.append(job)
        job.wait_for_step(seen + 3)
        if way == "torchrun killed":
            os.kill(job.process.pid, signal.SIGKILL)
            psutil.wait_procs(job.ranks, timeout=60)
            assert not any(rank.is_running() for rank in job.ranks)
            status, text = job.end()
        else:
            target = job.process.pid if way != "a rank alone" else job.ranks[-1].pid
            os.kill(target, signal.SIGINT if way == "SIGINT" else signal.SIGTERM)
            status, text = job.end()
            name = "SIGINT" if way == "SIGINT" else "SIGTERM"
            assert status == 128 + signal.Signals[name], text
            last = text.strip().splitlines()[-1]
            saved = f"error: stopped by {name}: saved step {job.steps()[-1]} in {save};"
            assert last == f"{saved} the same command goes on", text
        assert job.steps() == list(range(1, job.steps()[-1] + 1))
        tracker = save / "latest_checkpointed_iteration.txt"
        assert int(tracker.read_text()) == job.steps()[-1] > seen
        seen = job.steps()[-1]
        assert not (save / ".tsft_lock").exists()


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_others_at_once(
    world: World, tmp_path: Path, jobs: list[Job]
) -> None:
    """Though they wait for it inside a collective, where no Python handler runs."""
    job = Job(world, tmp_path / "run", 4000)
    jobs.append(job)
    job.wait_for_step(2)
    begun = time.monotonic()
    os.kill(job.ranks[0].pid, signal.SIGKILL)
    status, text = job.end()
    assert status == 1 and "signal SIGKILL" in text.strip().splitlines()[-1], text
    assert time.monotonic() - begun < 25, text
