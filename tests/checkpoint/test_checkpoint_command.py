"""The command line, and what a killed import leaves behind."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_tsft.checkpoint.card import ModelCard
from megatron_tsft.checkpoint.convert import import_hf
from megatron_tsft.checkpoint.folder import latest_checkpoint
from megatron_tsft.checkpoint.verify import verify
from megatron_tsft.errors import UserError

Make = Callable[..., Path]
Same = Callable[[Path, Path], None]
ROOT = Path(__file__).resolve().parents[2]

SLOW_IMPORT = """
import sys, time
from megatron_tsft.checkpoint import convert, units
from megatron_tsft.checkpoint.hf_folder import HfWeights
read = HfWeights.read
def slow(self, name, start, stop):
    if "layers.2" in name:
        print("writing", flush=True)
        time.sleep(60)
    return read(self, name, start, stop)
HfWeights.read = slow
convert.import_hf(sys.argv[1], sys.argv[2], progress=False)
"""


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run tools/convert_checkpoint.py as a user does."""
    line = [sys.executable, str(ROOT / "tools" / "convert_checkpoint.py"), *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, env=environment(), timeout=300)


def test_import_export_and_verify_from_the_shell(make_hf: Make, assert_same_tensors: Same, tmp_path: Path) -> None:
    source, megatron, back = make_hf(), tmp_path / "megatron", tmp_path / "back"
    done = command("import", "--hf", source, "--megatron", megatron, "--verify")
    assert done.returncode == 0, done.stderr
    assert f"wrote {megatron}: LlamaForCausalLM, 3 layers, float32, vocabulary 1003 padded to 1024" in done.stdout
    assert "30 of 30 tensors are identical bit by bit" in done.stdout and "100%" in done.stderr
    done = command("export", "--megatron", megatron, "--hf", back, "--no-progress")
    assert done.returncode == 0 and f"wrote {back} from {megatron / 'release'}: 30 tensors" in done.stdout
    assert not done.stderr
    assert_same_tensors(source, back)
    again = command("import", "--hf", source, "--megatron", megatron)
    assert again.returncode == 2 and again.stderr.startswith(f"error: {megatron} exists already")
    other = make_hf(name="other", rms_norm_eps=1e-6)
    (other / "model.safetensors").write_bytes((other / "model.safetensors").read_bytes()[:-4] + b"\0\0\0\1")
    done = command("verify", "--hf", other, "--megatron", megatron)
    assert done.returncode == 1 and "29 of 30" in done.stdout and "the models DIFFER" in done.stdout


def test_help_shows_examples() -> None:
    for arguments in (["--help"], ["import", "--help"]):
        done = command(*arguments)
        assert done.returncode == 0 and "examples:" in done.stdout


def test_a_killed_import_leaves_no_folder_that_loads(make_hf: Make, tmp_path: Path) -> None:
    source, megatron = make_hf(), tmp_path / "megatron"
    line = [sys.executable, "-c", SLOW_IMPORT, str(source), str(megatron)]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, text=True, env=environment())
    try:
        assert process.stdout is not None and process.stdout.readline() == "writing\n"  # layers 0 and 1 are written
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert not megatron.exists()
    (partial,) = tmp_path.glob(".megatron*")
    assert (partial / "release" / "__0_0.distcp").is_file()  # it was in the middle
    for folder in (megatron, partial):
        with pytest.raises(UserError):
            latest_checkpoint(folder)
        with pytest.raises(UserError):
            ModelCard.load(folder)
    started = time.monotonic()
    import_hf(source, megatron, progress=False)  # the next try clears it away and succeeds
    assert time.monotonic() - started < 30 and not partial.exists()
    assert verify(source, megatron, progress=False).passed
