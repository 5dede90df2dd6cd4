"""benchmarks/cache.py runs and says what it measured; what it measured is not judged here."""

import re
import subprocess
import sys
from pathlib import Path

from megatron_tsft.data.prepare import prepare
from tests.training.runs import REPOSITORY, make_hf, write_rows


def test_it_measures_writing_and_reading(tmp_path: Path) -> None:
    teacher = make_hf(tmp_path / "hf", num_hidden_layers=1)
    prepare(write_rows(tmp_path / "rows.jsonl", 20, 0), teacher, tmp_path / "data", progress=False)
    command = [
        sys.executable,
        str(REPOSITORY / "benchmarks/cache.py"),
        "--teacher",
        str(teacher),
        "--top-k",
        "16",
    ]
    command += [
        "--data",
        str(tmp_path / "data"),
        "--repeat",
        "1",
        "--seq-length",
        "64",
        "--step-seconds",
        "1",
    ]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert re.search(
        r"top-16: writing takes [\d.]+ x the teacher's forward alone .* bytes an entry on disk", out
    )
    assert re.search(
        r"top-16: reading: -?[\d.]+ ms more a pack of 64; -?[\d.]+% of a step of 1 s", out
    )
