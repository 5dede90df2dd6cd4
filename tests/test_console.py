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
