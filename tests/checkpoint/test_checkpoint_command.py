"""The command line, and what a killed command or a full disk leaves behind."""

import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_tsft.checkpoint.card import ModelCard
from megatron_tsft.checkpoint.convert import export_hf, import_hf
from megatron_tsft.checkpoint.folder import latest_checkpoint
from megatron_tsft.checkpoint.verify import verify
from megatron_tsft.errors import UserError
from tools.convert_checkpoint import main

Make = Callable[..., Path]
Same = Callable[[Path, Path], None]
Command = Callable[..., tuple[int, str, str]]
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

SLOW_EXPORT = """
import sys, time
from megatron_tsft.checkpoint import convert
pieces_of = convert.pieces_of
def slow(steps, reader, dtypes):
    for piece in pieces_of(steps, reader, dtypes):
        if "layers.2" in piece.name:
            print("writing", flush=True)
            time.sleep(60)
        yield piece
convert.pieces_of = slow
convert.export_hf(sys.argv[1], sys.argv[2], progress=False)
"""


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def shell(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run tools/convert_checkpoint.py as a user does."""
    line = [sys.executable, str(ROOT / "tools" / "convert_checkpoint.py"), *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, env=environment(), timeout=300)


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """The same in this process, which has torch already: (exit status, stdout, stderr)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        status = main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return status, out, err

    return run


def kill_in_the_middle(program: str, *arguments: Path) -> None:
    """Start a program that says "writing" and then waits; kill it there."""
    line = [sys.executable, "-c", program, *map(str, arguments)]
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True, env=environment()) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == "writing\n"
        finally:
            os.kill(process.pid, signal.SIGKILL)


def test_import_from_the_shell(make_hf: Make, tmp_path: Path) -> None:
    source, megatron = make_hf(), tmp_path / "megatron"
    done = shell("import", "--hf", source, "--megatron", megatron, "--verify")
    assert done.returncode == 0, done.stderr
    assert (
        f"wrote {megatron}: LlamaForCausalLM, 3 layers, float32, vocabulary 1003 padded to 1024"
        in done.stdout
    )
    assert (
        "the models agree: 30 of 30 tensors are identical; logits at 256 positions" in done.stdout
        and "100%" in done.stderr
    )


def test_import_export_and_verify(
    command: Command, make_hf: Make, assert_same_tensors: Same, tmp_path: Path
) -> None:
    source, megatron, back = make_hf(), tmp_path / "megatron", tmp_path / "back"
    assert command("import", "--hf", source, "--megatron", megatron)[0] == 0
    status, out, err = command("export", "--megatron", megatron, "--hf", back, "--no-progress")
    assert (
        status == 0 and f"wrote {back} from {megatron / 'release'}: 30 tensors" in out and not err
    )
    assert_same_tensors(source, back)
    other = make_hf(name="other", rms_norm_eps=1e-6)
    (other / "model.safetensors").write_bytes(
        (other / "model.safetensors").read_bytes()[:-4] + b"\0\0\0\1"
    )
    status, out, _ = command("verify", "--hf", other, "--megatron", megatron)
    assert status == 1 and "29 of 30" in out and "the models DIFFER" in out


def test_verify_prints_the_logits_and_nothing_of_megatrons(
    command: Command, make_hf: Make, tmp_path: Path
) -> None:
    source, megatron, text = make_hf(tokenizer=True), tmp_path / "megatron", tmp_path / "text.txt"
    text.write_text("one and two is three " * 10)
    command("import", "--hf", source, "--megatron", megatron)
    status, out, err = command(
        "verify", "--hf", source, "--megatron", megatron, "--text", text, "--no-progress"
    )
    assert status == 0
    assert out.startswith(
        "the models agree: 30 of 30 tensors are identical; logits at 50 positions differ by at most"
    )
    assert (
        out.count("\n") == 1
        and "same argmax at 100.00%" in out
        and out.endswith("same tokenizer\n")
    )
    assert "DEPRECATED" not in err and "not installed" not in err


def test_a_mistake_is_one_line(command: Command, make_hf: Make, tmp_path: Path) -> None:
    source, megatron = make_hf(), tmp_path / "megatron"
    command("import", "--hf", source, "--megatron", megatron)
    mistakes = {
        (
            "import",
            "--hf",
            source,
            "--megatron",
            megatron,
        ): f"{megatron} exists already: .* pass --overwrite",
        (
            "import",
            "--hf",
            tmp_path / "nowhere",
            "--megatron",
            tmp_path / "m",
        ): "nowhere does not exist",
        ("import", "--hf", tmp_path, "--megatron", tmp_path.parent / "m"): "has no config.json",
        ("export", "--megatron", source, "--hf", tmp_path / "h"): "has no tsft_model.json",
        (
            "export",
            "--megatron",
            tmp_path / "m",
            "--hf",
            tmp_path / "h",
        ): "m does not exist: name a",
        (
            "export",
            "--megatron",
            megatron,
            "--hf",
            tmp_path / "h",
            "--iteration",
            5,
        ): "iter_0000005 does not exist",
        ("verify", "--hf", tmp_path / "nowhere", "--megatron", megatron): "nowhere does not exist",
        (
            "verify",
            "--hf",
            source,
            "--megatron",
            megatron,
            "--text",
            ROOT / "LICENSE",
        ): "has no tokenizer: leave",
    }
    for arguments, words in mistakes.items():
        status, _, err = command(*arguments, "--no-progress")
        assert status == 2 and re.search(words, err), err
        assert err.startswith("error: ") and err.count("\n") == 1
    for flags in (
        ("import", "--hf", source, "--megatron", tmp_path / "m", "--text", ROOT / "LICENSE"),
        (
            "import",
            "--hf",
            source,
            "--megatron",
            tmp_path / "m",
            "--verify",
            "--text",
            tmp_path / "t",
        ),
        (
            "verify",
            "--hf",
            source,
            "--megatron",
            megatron,
            "--weights-only",
            "--text",
            ROOT / "LICENSE",
        ),
    ):
        with pytest.raises(SystemExit, match="2"):
            command(*flags)
    assert not (tmp_path / "m").exists()


@pytest.mark.slow
def test_ctrl_c_is_one_line_and_leaves_nothing(make_hf: Make, tmp_path: Path) -> None:
    """Also in the thread that fills boxes, and while the files are flushed."""
    source = make_hf()
    # the interrupt comes first, also on a busy machine
    wait = "print('now', flush=True); time.sleep(5)"
    slow = {
        "writing": "from megatron_tsft.checkpoint import torch_dist as m; m.Ring.take = lambda"
        f" *_: exec({wait!r})",
        "flushing": "from megatron_tsft import atomic as m; m.fsync_path = lambda _:"
        f" exec({wait!r})",
    }
    for name, patch in slow.items():
        target = tmp_path / name
        # a shell's background jobs ignore the interrupt, and so would their children
        hear = "signal.signal(signal.SIGINT, signal.default_int_handler)"
        run = "from tools.convert_checkpoint import main; sys.exit(main(sys.argv[1:]))"
        program = f"import signal, sys, time; {hear}; {patch}; {run}"
        line = [
            sys.executable,
            "-c",
            program,
            "import",
            "--hf",
            str(source),
            "--megatron",
            str(target),
        ]
        with subprocess.Popen(line, stdout=-1, stderr=-1, text=True, env=environment()) as process:
            try:
                assert process.stdout is not None and process.stdout.readline() == "now\n"
                time.sleep(0.5)
                process.send_signal(signal.SIGINT)
                error = process.communicate(timeout=90)[1].splitlines()[-1]
            finally:
                process.kill()
        assert process.returncode == 130, (name, error)
        assert error == "error: import stopped: interrupted; nothing is left half-written"
        assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_full_disk_is_one_line_and_leaves_nothing(
    command: Command, make_hf: Make, tmp_path: Path
) -> None:
    source, imported = make_hf(), tmp_path / "imported"
    import_hf(source, imported, progress=False)
    names = {path.name for path in tmp_path.iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for arguments in (
        ("import", "--hf", source, "--megatron", tmp_path / "megatron"),
        ("export", "--megatron", imported, "--hf", tmp_path / "back"),
    ):
        resource.setrlimit(
            resource.RLIMIT_FSIZE, (300_000, hard)
        )  # the error comes in the middle of the weights
        try:
            status, _, err = command(*arguments, "--no-progress")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert status == 2
        assert (
            err == f"error: {arguments[0]} stopped: [Errno 27] File too large; nothing is left"
            " half-written\n"
        )
        assert {path.name for path in tmp_path.iterdir()} == names


def test_help_shows_examples_and_does_not_wait_for_torch() -> None:
    script = str(ROOT / "tools" / "convert_checkpoint.py")
    for arguments in (["--help"], ["import", "--help"]):
        line = [sys.executable, "-X", "importtime", script, *arguments]  # prints every import
        done = subprocess.run(line, capture_output=True, text=True, env=environment(), timeout=60)
        assert done.returncode == 0 and "examples:" in done.stdout
        assert "argparse" in done.stderr and "torch" not in done.stderr


def test_a_killed_export_leaves_no_folder_that_loads(
    make_hf: Make, assert_same_tensors: Same, tmp_path: Path
) -> None:
    source, megatron, back = make_hf(), tmp_path / "megatron", tmp_path / "back"
    import_hf(source, megatron, progress=False)
    kill_in_the_middle(SLOW_EXPORT, megatron, back)
    assert not back.exists()
    (partial,) = tmp_path.glob(".back.*.partial")
    assert (partial / "model.safetensors").stat().st_size > 0 and not (
        partial / "config.json"
    ).exists()
    with pytest.raises(UserError):
        import_hf(partial, tmp_path / "again", progress=False)
    export_hf(megatron, back, progress=False)
    assert not partial.exists()
    assert_same_tensors(source, back)


def test_a_killed_import_leaves_no_folder_that_loads(make_hf: Make, tmp_path: Path) -> None:
    source, megatron = make_hf(), tmp_path / "megatron"
    kill_in_the_middle(SLOW_IMPORT, source, megatron)  # layers 0 and 1 are written
    assert not megatron.exists()
    (partial,) = tmp_path.glob(".megatron.*.partial")
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
