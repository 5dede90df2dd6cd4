"""A tenth of dev/faults.py: pairs of jobs in one place, and a run that is killed at random."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
GOOD = {
    "the second was told who",
    "the second was told it is there",
    "the second found it done",
}


def faults(folder: Path, *words: str) -> dict[str, Any]:
    output = folder / "result.json"
    command = [sys.executable, str(REPOSITORY / "dev" / "faults.py"), *words]
    command += ["--folder", str(folder / "place"), "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads(output.read_text())


@pytest.mark.slow
def test_pairs(tmp_path: Path) -> None:
    for kinds, pairs in ((("export", "import", "prepare", "cache"), 3), (("run",), 1)):
        table = faults(tmp_path, "races", "--pairs", str(pairs), "--kind", *kinds)
        for kind in kinds:
            assert sum(table[kind].values()) == pairs and set(table[kind]) <= GOOD


@pytest.mark.slow
def test_kills(tmp_path: Path) -> None:
    result = faults(tmp_path, "soak", "--steps", "50", "--kills", "2", "--spread", "0.5")
    assert sum(result["kills"].values()) == 2 and all(result["same"].values())
