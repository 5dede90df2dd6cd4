"""What a person sees of a run: a few lines to the first step, the rest in the log, the error
last."""

import shutil
from pathlib import Path

import pytest

from megatron_tsft.data.prepared import DataCard
from tests.training.runs import Train, World, check_ran

TP2 = ("--tensor-model-parallel-size", "2")
SAID = "successfully saved checkpoint"


def lines_of(log: str) -> list[str]:
    return [line for line in log.splitlines() if line.strip()]


@pytest.mark.slow
def test_few_lines_to_the_first_step(train: Train, world: World) -> None:
    flags = ("--tsft-eval-data", str(world.held), *TP2)
    run = check_ran(train("quiet", *flags, ranks=2, steps=2, keep=True))
    seen = lines_of("\n".join(run.logs))  # of all ranks, as on one screen
    first = next(i for i, line in enumerate(seen) if line.startswith("step 1 "))
    assert first <= 15, seen[:first]
    heads = [line.split(" ")[0] for line in seen]
    assert heads.count("step") == 2 and heads.count("heldout") == 1
    for said in ("weights: ", "objective: ", "train: ", "evaluation: ", "log: "):
        assert sum(line.startswith(said) for line in seen) == 1, said
    assert sum(SAID in line for line in seen) == 1
    assert len(seen) < 25 and not any("Warning" in line for line in seen)

    logs = sorted((run.save / "logs").iterdir())
    assert [path.name for path in logs] == ["rank-00000.txt", "rank-00001.txt"]
    kept = logs[0].read_text()
    assert "end of arguments" in kept and "weights: " in kept and SAID in kept
    assert "repairs of Megatron's defects: " in kept
    assert "step 1 " in logs[1].read_text()  # the last rank says it

    check_ran(train("quiet", *flags, ranks=2, steps=2, keep=True))  # nothing left to do
    assert logs[0].read_text().count("==== ") == 2  # the next start appends


@pytest.mark.slow
def test_verbose_brings_it_back(train: Train) -> None:
    run = check_ran(train("loud", "--tsft-verbose", "--tsft-args", "eta=0", steps=1))
    assert "end of arguments" in run.logs[0] and not (run.save / "logs").exists()


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_damaged_conversation(train: Train, world: World, tmp_path: Path, workers: str) -> None:
    """Met in the middle of the loop, also by a data loader's worker: one line, and it is the
    last."""
    data = tmp_path / "damaged"
    shutil.copytree(world.train, data)
    name = next(iter(DataCard.load(data).files))
    content = bytearray((data / name).read_bytes())
    ids = [3, 4]  # "plus is", in the middle of every conversation
    found = bytes(content).find(b"".join(i.to_bytes(4, "little") for i in ids))
    assert found > 0
    content[found] ^= 1
    (data / name).write_bytes(bytes(content))
    flags = ("--tsft-data", str(data), "--num-workers", workers, "--tsft-args", "eta=0")
    run = train("run", *flags, steps=40)
    last = lines_of(run.logs[0])[-1]
    assert run.codes == [2] and last.startswith("error: conversation "), run.logs[0][-1500:]
    assert "is damaged" in last and "prepare the data again" in last
