"""--tsft-keep-last deletes whole older checkpoints, and nothing else."""

from pathlib import Path

import pytest

from megatron_tsft.checkpoint.folder import read_metadata
from megatron_tsft.checkpoint.manifest import check_files
from megatron_tsft.errors import UserError
from megatron_tsft.plan.command_line import CommandLine
from megatron_tsft.plan.config import TsftConfig
from megatron_tsft.plan.refused import check_numbers
from tests.training.runs import Train, check_ran

SFT = ("--tsft-objective", "sft", "--save-interval", "1")


def iterations(save: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("iter_")) for path in save.glob("iter_*"))


@pytest.mark.parametrize("mode", [(), ("--async-save",)], ids=["plain", "async"])
def test_the_newest_and_every_kth_stay(train: Train, tmp_path: Path, mode: tuple[str, ...]) -> None:
    save = tmp_path / "run"
    check_ran(train(save, *SFT, *mode, steps=2, keep=True))
    # an interrupted save, a link and the leftovers of a killed deletion
    (save / "iter_0000002" / ".metadata").unlink()
    (save / "latest_checkpointed_iteration.txt").write_text("1")
    (save / ".deleted-iter_0000009").mkdir()
    words = ("--tsft-keep-last", "2", "--tsft-keep-every", "3")
    check_ran(train(save, *SFT, *mode, *words, steps=7, keep=True))
    assert iterations(save) == [3, 6, 7]
    check_ran(train(save, *SFT, *mode, "--tsft-keep-last", "1", steps=8, keep=True))
    assert iterations(save) == [8] and not list(save.glob(".deleted*"))
    read_metadata(save / "iter_0000008")
    assert check_files(save / "iter_0000008") == []


def test_a_finished_run_says_so(train: Train, tmp_path: Path) -> None:
    words = ("--tsft-objective", "sft", "--train-iters", "2")
    check_ran(train(tmp_path / "run", *words, keep=True))
    run = check_ran(train(tmp_path / "run", *words, keep=True))
    assert "2 steps, which are all of this run: a larger --train-iters goes on" in run.logs[0]
    assert [row["step"] for row in run.rows] == [1, 2]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"keep_last": 0}, "--tsft-keep-last 0: pass at least 1"),
        ({"keep_every": 5}, "add --tsft-keep-last"),
        ({"keep_last": 1, "keep_every": -1}, "--tsft-keep-every -1"),
        ({"stop_at_spike": 1.0}, "--tsft-stop-at-spike 1.0"),
        ({"stop_at_spike": float("nan")}, "--tsft-stop-at-spike nan"),
        ({"keep_last": 2, "reference_refresh": 5}, "add --tsft-keep-every 5"),
    ],
)
def test_numbers_that_mean_nothing(given: dict[str, float], message: str) -> None:
    options = {f"tsft_{name}": value for name, value in given.items()}
    line = CommandLine((), options, {}, TsftConfig.from_given(options))
    with pytest.raises(UserError, match=message):
        check_numbers(line)
