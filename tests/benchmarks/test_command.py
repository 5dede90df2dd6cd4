"""What every benchmark shares: the command that its page shows, and one line for a user's error."""

from pathlib import Path

import pytest

from megatron_tsft.errors import UserError
from shared import command


@pytest.mark.parametrize("output", ["--output {}/out", "--output={}/out"])
def test_a_command_is_shown_as_it_was_given_but_for_the_output_folder(
    output: str, tmp_path: Path
) -> None:
    words = [*output.format(tmp_path).split(), "--data", "two words", "--tp", "2"]
    shown = command.command_line("benchmarks/x.py", words)
    assert shown == f"benchmarks/x.py {output[:8]}{output[8]}out --data 'two words' --tp 2"


def test_errors_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    @command.says_errors
    def main(argv: list[str] | None) -> int:
        if argv:
            raise UserError("--x 3: at most 2")
        raise KeyboardInterrupt

    assert (main(["--x"]), capsys.readouterr().err) == (2, "error: --x 3: at most 2\n")
    assert main([]) == 130
    assert capsys.readouterr().err.count("\n") == 1


def test_a_file_is_no_output_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file: name a folder"):
        command.check_output(str(tmp_path / "file"))
    assert command.check_output(str(tmp_path / "new")) == tmp_path / "new"
