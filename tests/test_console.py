"""A quiet console shows what a person needs; the log has everything, from all sides."""

import subprocess
import sys
from pathlib import Path

PROGRAM = """
import os, subprocess, sys
from pathlib import Path
from megatron_tsft import console

with console.quiet({verbose}):
    print("chatter before the folder is known")
    os.write(2, b"from compiled code\\n")
    console.say("the plan")
    print("> successfully saved checkpoint from iteration 4")
    if {keep}:
        console.keep_log(Path({folder!r}) / "logs" / "rank-00000.txt", "a run")
    print("chatter after")
    print("a warning", file=sys.stderr)
    subprocess.run(["echo", "from a child"])
    console.say("step 1")
    print("bar", file=console.stream())
    {end}
print("after")
"""


def start(
    folder: Path, verbose: bool = False, keep: bool = True, end: str = "pass"
) -> tuple[str, str, int]:
    text = PROGRAM.format(verbose=verbose, keep=keep, folder=str(folder), end=end)
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True)
    return done.stdout, done.stderr, done.returncode


def test_the_screen_and_the_log(tmp_path: Path) -> None:
    out, err, code = start(tmp_path)
    assert out.splitlines() == [
        "the plan",
        "> successfully saved checkpoint from iteration 4",
        "step 1",
        "after",
    ]
    assert err.splitlines() == ["bar"] and code == 0
    lines = (tmp_path / "logs" / "rank-00000.txt").read_text().splitlines()
    assert lines[1].startswith("==== ") and lines[1].endswith(" a run")
    expected = {
        "chatter before the folder is known",
        "from compiled code",
        "the plan",
        "> successfully saved checkpoint from iteration 4",
        "chatter after",
        "a warning",
        "from a child",
        "step 1",
    }
    assert set(lines[2:]) == expected
    assert lines.index("the plan") < lines.index("step 1")


def test_a_second_run_appends(tmp_path: Path) -> None:
    start(tmp_path)
    start(tmp_path)
    assert (tmp_path / "logs" / "rank-00000.txt").read_text().count("==== ") == 2


def test_verbose_shows_everything_and_keeps_no_log(tmp_path: Path) -> None:
    out, err, _ = start(tmp_path, verbose=True)
    assert "chatter after" in out and "from a child" in out and "from compiled code" in err
    assert not list(tmp_path.iterdir())


def test_an_error_comes_out_of_the_quiet(tmp_path: Path) -> None:
    out, err, code = start(tmp_path, keep=False, end="raise RuntimeError('what was wrong')")
    assert err.strip().splitlines()[-1] == "RuntimeError: what was wrong"
    assert code == 1 and "after" not in out and not list(tmp_path.iterdir())


def test_why_megatron_stopped_is_shown(tmp_path: Path) -> None:
    """Its own text (training/training.py, print_datetime), and its last words before an exit."""
    said = "print('[exiting program at iteration 2] datetime: 2026-11-30')"
    out, _, _ = start(tmp_path, end=said)
    assert "[exiting program at iteration 2] datetime: 2026-11-30" in out
    out, _, _ = start(tmp_path, end="print('Unable to load'); console.say(console.last_words())")
    assert "Unable to load" in out.splitlines()


def test_a_defect_shows_the_end_of_a_log_that_nobody_keeps(tmp_path: Path) -> None:
    _, err, _ = start(tmp_path, keep=False, end="raise RuntimeError('what was wrong')")
    assert "| chatter after" in err and "| from a child" in err


def test_bytes_odd_names_and_closed_streams(tmp_path: Path) -> None:
    write = "sys.stdout.buffer.write(b'raw'); console.say('\\udce4 name'); "
    out, _, code = start(tmp_path, end=write)
    assert code == 0 and "\\udce4 name" in out
    text = PROGRAM.format(verbose=False, keep=True, folder=str(tmp_path), end="pass")
    command = '"$0" -c "$1" >&- 2>&-'
    done = subprocess.run(["sh", "-c", command, sys.executable, text], capture_output=True)
    assert done.returncode == 0 and done.stdout == done.stderr == b""
