"""Import, export and verify hold a few buffers: memory stays far below the size of the model."""

import json
from pathlib import Path

import pytest

from benchmarks.convert import main

MEGABYTE = 2**20


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_memory_is_bounded_whatever_the_size(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--output", str(tmp_path / "bench"), "--gigabytes", "1.5"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    print(result)
    assert result["bytes"] > 1400 * MEGABYTE and result["largest"] > 150 * MEGABYTE
    # Python with torch and transformers holds some 260 MB, the buffers 100 to 200
    assert all(0 < peak < 600 * MEGABYTE for peak in result["anonymous"].values()), result
    assert not (tmp_path / "bench").exists()
    assert main(["--output", str(tmp_path), "--gigabytes", "1.5"]) == 2
