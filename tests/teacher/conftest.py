"""A session's teacher folder and the data sets that its tests cache; all of one word-level
tokenizer."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron_tsft.data.prepared import PreparedData
from tests.teacher.caches import prepared
from tests.training.runs import make_hf


@dataclass(frozen=True)
class Home:
    """hf: the teacher. train, held: data sets with nothing in common. both: held, and a part of its
    own."""

    root: Path
    train: PreparedData
    held: PreparedData
    both: PreparedData

    @property
    def hf(self) -> Path:
        return self.root / "hf"


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    root = tmp_path_factory.mktemp("teacher")
    make_hf(root / "hf")
    train, held = prepared(root, "train", 40, 0), prepared(root, "held", 12, 1)
    return Home(root, train, held, prepared(root, "both", 9, 2, again=["held"]))
