"""dev/fuzz.py: a tenth of its cases end as cases may, and it would notice where one did not."""

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dev.fuzz import cases, main, parse
from fuzzing import targets
from fuzzing.captured import Fault, Refused, command, read
from fuzzing.cases import ALLOWED
from fuzzing.damage import damage
from megatron_tsft.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = REPOSITORY / "dev" / "fuzz.py"


@pytest.mark.slow
def test_a_tenth_of_the_cases(tmp_path: Path) -> None:
    """The first 1300 of the committed seed, in processes as `dev/fuzz.py` runs them."""
    words = ["--cases", "1300", "--seed", "0", "--output", str(tmp_path / "fuzz.json")]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *words],
        cwd=REPOSITORY,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(REPOSITORY), "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "fuzz.json").read_text())
    assert results["cases"] == 1300 and not results["faults"]
    for outcomes in results["outcomes"].values():
        assert outcomes["refused"] > 50 and outcomes.keys() <= set(ALLOWED)


def test_one_of_many_is_named_by_target() -> None:
    args = parse(["--target", "hf", "cards", "--cases", "5", "--seed", "3"])
    found = [(case.target, case.seed, case.number) for case in cases(args, float("inf"))]
    assert found == [("hf", 3, 0), ("cards", 3, 0), ("hf", 3, 1), ("cards", 3, 1), ("hf", 3, 2)]
    assert not list(cases(args, 0.0))  # it is too late
    assert main(["--case", "1"]) == 2


def test_a_seed_does_the_same_again(tmp_path: Path) -> None:
    targets.make_metrics(tmp_path)
    (tmp_path / "whole" / "card.json").write_text(
        json.dumps({"a": {"b": [1, 2.5, "c"]}, "d": None})
    )
    seen = set()
    for number in range(40):
        results = []
        for again in ("one", "two"):
            shutil.copytree(tmp_path / "whole", tmp_path / again)
            done = damage(tmp_path / again, random.Random(number))
            results.append((done, targets.contents(tmp_path / again)))
            shutil.rmtree(tmp_path / again)
        assert results[0] == results[1]
        seen.add(results[0][0])
    assert len(seen) > 35


def test_what_a_command_may_and_may_not_do(tmp_path: Path) -> None:
    def refuses() -> int:
        raise UserError("it is wrong:\nmend it")

    with pytest.raises(Refused, match="^error: it is wrong: mend it$"):
        read(refuses)
    assert command(lambda: print("done") or 0) == "done\n"
    with pytest.raises(Refused, match="they DIFFER"):
        command(lambda: print("they DIFFER") or 1)
    with pytest.raises(Fault, match="ZeroDivisionError") as fault:
        read(lambda: 1 // 0)
    assert fault.value.outcome == "traceback"
    with pytest.raises(Fault, match="status 2") as fault:
        command(lambda: print("error: one\nerror: two", file=sys.stderr) or 2)
    (tmp_path / ".out.partial").mkdir()
    with pytest.raises(Fault, match=r"\.out\.partial is left by: .*it is wrong") as fault:
        command(lambda: read(refuses), tmp_path / "out")
    assert fault.value.outcome == "half-written"


def test_conversations_are_counted_and_the_others_stay(tmp_path: Path) -> None:
    whole, after = tmp_path / "whole", tmp_path / "after"
    for folder, lines in ((whole, b"a\nb\nc\n"), (after, b"a\nB\nc\n")):
        folder.mkdir()
        (folder / "x").write_bytes(lines)

    def judged(ids: list[str], refused: int) -> str:
        before = {"x": [["1", "2", "3"], 0]}
        return targets.judge_conversations({"x": [ids, refused]}, before, after, whole)

    assert judged(["1", "2", "3"], 0) == "same"
    assert judged(["1", "9", "3"], 0) == "changed"
    assert judged(["1", "3"], 1) == "refused"
    for ids, refused in ((["1", "3"], 0), (["9", "2", "3"], 0), (["1", "2", "3"], 1)):
        assert judged(ids, refused) == "other"


def test_a_card_without_its_checksum_would_be_noticed(tmp_path: Path) -> None:
    """The fault that cards had: what most of their fields say shows in nothing else."""
    targets.make_cards(tmp_path)
    whole = targets.read_cards(tmp_path / "whole", tmp_path, tmp_path)
    path = shutil.copytree(tmp_path / "whole", tmp_path / "in") / "tsft_data.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"supervised_tokens": 1}))
    with pytest.raises(Refused, match="its checksum differs"):
        targets.read_cards(tmp_path / "in", tmp_path, tmp_path)
    assert targets.without_checksum(path)
    found = targets.read_cards(tmp_path / "in", tmp_path, tmp_path)
    assert targets.judge_cards(found, whole, tmp_path / "in", tmp_path / "whole") == "other"
