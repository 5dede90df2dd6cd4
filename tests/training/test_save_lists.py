"""A run's checkpoints have checksums, and a damaged one is never resumed."""

from pathlib import Path

import pytest

from megatron_tsft.checkpoint.manifest import LISTS, check_files, read_lists
from tests.checkpoint.test_manifest import flip
from tests.training.runs import Train, check_ran


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
