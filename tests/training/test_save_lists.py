"""A run's checkpoints have checksums, and a damaged one is never resumed."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_tsft.checkpoint.folder import TRACKER
from megatron_tsft.checkpoint.manifest import LISTS, check_files, read_lists
from tests.checkpoint.test_manifest import flip
from tests.training.runs import CACHE_TOOL, Train, World, check_ran


@pytest.mark.parametrize(
    "flags", [(), pytest.param(("--async-save",), marks=pytest.mark.slow)], ids=["plain", "async"]
)
def test_every_file_of_a_save_is_listed(
    train: Train, tmp_path: Path, flags: tuple[str, ...]
) -> None:
    save = tmp_path / "run"
    words = ("--pipeline-model-parallel-size", "2", "--save-interval", "2", *flags)
    check_ran(train(save, *words, ranks=2, steps=4, keep=True))
    for step in (2, 4):
        folder = save / f"iter_{step:07d}"
        assert check_files(folder) == []
        assert {"__0_0.distcp", "__1_0.distcp", ".metadata"} <= set(read_lists(folder))
        assert len(list(folder.glob(LISTS))) == 2


def steps(save: Path) -> list[int]:
    rows = map(json.loads, (save / "metrics.jsonl").read_text().splitlines())
    return [row["step"] for row in rows if row.get("split") != "heldout"]


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_it_taken(
    train: Train, tmp_path: Path, ranks: int
) -> None:
    """And the run ends where an undamaged one does."""
    layout = ("--pipeline-model-parallel-size", str(ranks), "--tsft-objective", "sft")
    words = (*layout, "--save-interval", "2")
    save = tmp_path / "run"
    check_ran(train(save, *words, ranks=ranks, steps=4, keep=True))
    check_ran(train("straight", *words, ranks=ranks, steps=6, keep=True))
    file = save / "iter_0000004" / f"__{ranks - 1}_0.distcp"
    flip(file, file.stat().st_size // 2, 5)
    run = check_ran(train(save, *words, ranks=ranks, steps=6, keep=True))
    warning = f"WARNING: {file} is damaged (its checksum differs)"
    assert warning in run.logs[0] and "iteration 2 takes its place" in run.logs[0]
    assert steps(save) == [1, 2, 3, 4, 5, 6]
    left, right = ((tmp_path / n / "metrics.jsonl").read_text() for n in ("run", "straight"))
    last = [json.loads(text.splitlines()[-1]) for text in (left, right)]
    assert last[0]["loss"] == last[1]["loss"] and last[0]["grad_norm"] == last[1]["grad_norm"]
    assert check_files(save / "iter_0000004") == []  # saved again, and listed again
    described = save / "iter_0000006" / ".metadata"
    flip(described, 30, 5)  # the newest again: what describes it
    (save / "iter_0000004" / "__0_0.distcp").write_bytes(b"cut")
    run = check_ran(train(save, *words, ranks=ranks, steps=8, keep=True))
    assert f"WARNING: {described} " in run.logs[0], run.logs[0][-2000:]
    assert "iteration 2 takes its place" in run.logs[0] and steps(save) == list(range(1, 9))
    for number in (2, 4, 6, 8):
        file = save / f"iter_{number:07d}" / "__0_0.distcp"
        flip(file, file.stat().st_size // 2, 5)
    run = train(save, *words, ranks=ranks, steps=10, keep=True)
    assert run.codes[0] == 2, run.logs[0][-3000:]
    assert "is damaged (its checksum differs)" in run.error


@pytest.mark.parametrize("text", [None, "", "12", b"\xff\xfe", "release"])
def test_a_tracker_that_is_gone_or_torn(
    train: Train, tmp_path: Path, text: str | bytes | None
) -> None:
    """Never a silent start at step 0 over an old run."""
    words = ("--tsft-objective", "sft", "--save-interval", "2")
    save = tmp_path / "run"
    check_ran(train(save, *words, steps=2, keep=True))
    tracker = save / TRACKER
    if text is None:
        tracker.unlink()
    else:
        tracker.write_bytes(text if isinstance(text, bytes) else text.encode())
    run = check_ran(train(save, *words, steps=4, keep=True))
    assert "it names iteration 2 now" in run.logs[0] and steps(save) == [1, 2, 3, 4]


def test_a_damaged_teacher_is_not_asked(world: World, tmp_path: Path) -> None:
    shutil.copytree(world.base, tmp_path / "teacher")
    (file,) = (tmp_path / "teacher" / "release").glob("*.distcp")
    flip(file, file.stat().st_size // 2, 5)
    words = ["--teacher", tmp_path / "teacher", "--data", world.held, "--output", tmp_path / "out"]
    line = [sys.executable, CACHE_TOOL, *words, "--top-k", "4", "--device", "cpu"]
    done = subprocess.run([str(word) for word in line], capture_output=True, text=True)
    assert done.returncode == 2 and not (tmp_path / "out").exists()
    assert "is damaged (its checksum differs)" in done.stderr.strip().splitlines()[-1]
