"""A run that resumes as another one is refused by name; what it may change is said."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_tsft.data.prepare import prepare
from tests.training.runs import Run, Train, World, check_ran, write_rows

TARGET = ("--tsft-objective", "target-sft", "--tsft-args", "eta=0.5")
GUIDED = (*TARGET, "--tsft-teacher", "reference")


@pytest.fixture(scope="module")
def begun(
    train_in: Callable[[Path], Train], world: World, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A folder with two steps of three runs: guided by the reference, weighted, of plain descent;
    and weighted data with other weights."""
    folder = tmp_path_factory.mktemp("begun")
    for name, weight in (("weighted", 2.0), ("heavier", 3.0)):
        rows = write_rows(folder / f"{name}.jsonl", 40, 2, weight=weight)
        prepare(rows, world.hf, folder / name, progress=False)
    train = train_in(folder)
    check_ran(train("guided", *GUIDED, steps=2, keep=True))
    words = ("--tsft-objective", "sft", "--tsft-data", str(folder / "weighted"))
    check_ran(train("weighed", *words, steps=2, keep=True))
    check_ran(train("descent", "--tsft-objective", "sft", "--optimizer", "sgd", steps=2, keep=True))
    return folder


def resume(train: Train, begun: Path, tmp_path: Path, name: str, *flags: str) -> Run:
    """The run, from a copy, two steps on."""
    shutil.copytree(begun / name, tmp_path / name)
    return train(tmp_path / name, *flags, steps=4, keep=True)


CASES: dict[str, tuple[str, tuple[str, ...], str]] = {
    "objective": ("guided", ("--tsft-objective", "dft"), "another --tsft-objective"),
    "parameter": ("guided", (*TARGET[:3], "eta=0.7"), "eta=0.7"),
    "no teacher": ("guided", (*TARGET[:3], "eta=0"), "--tsft-objective or --tsft-args"),
    "another teacher": (
        "guided",
        (*TARGET, "--tsft-teacher", "model", "--tsft-teacher-load", "BASE"),
        "another --tsft-teacher (reference ",
    ),
    "refreshed": (
        "guided",
        (*GUIDED, "--tsft-reference-refresh", "1000"),
        "another --tsft-teacher",
    ),
    "precision": ("guided", (*GUIDED, "--bf16"), "trained in fp32, this run is in bf16"),
    "optimizer": ("guided", (*GUIDED, "--optimizer", "sgd"), "with --optimizer adam, this run has"),
    "distributed optimizer": (
        "guided",
        (*GUIDED, "--use-distributed-optimizer"),
        "with the plain optimizer, this run has --use-distributed-optimizer",
    ),
    "row weights": (
        "weighed",
        ("--tsft-objective", "sft", "--tsft-data", "HEAVIER"),
        "another row weights in --tsft-data",
    ),
    "another step": ("guided", (*GUIDED, "--ckpt-step", "1"), "iter_0000001 does not exist"),
}


@pytest.mark.parametrize("case", list(CASES))
def test_refused(train: Train, world: World, begun: Path, tmp_path: Path, case: str) -> None:
    name, flags, message = CASES[case]
    places = {"BASE": str(world.base), "HEAVIER": str(begun / "heavier")}
    run = resume(train, begun, tmp_path, name, *(places.get(flag, flag) for flag in flags))
    assert run.codes == [2] and message in run.error, run.logs[0][-2000:]
    assert case == "another step" or "--finetune" in run.error
    assert [path.name for path in run.save.glob("iter_*")] == ["iter_0000002"]


def test_accepted_and_said(train: Train, begun: Path, tmp_path: Path) -> None:
    words = (*GUIDED, "--clip-grad", "0.5", "--lr-decay-style", "linear")
    run = check_ran(resume(train, begun, tmp_path, "guided", *words))
    said = next(line for line in run.logs[0].splitlines() if line.startswith("another than in"))
    assert "--clip-grad 1.0, now 0.5" in said and "--lr-decay-style constant, now linear" in said
    assert "micro-batch" not in said


def test_without_the_optimizer_as_asked(train: Train, begun: Path, tmp_path: Path) -> None:
    """--no-load-optim is honoured: the first moments begin anew, so the step is another one."""
    usual = check_ran(resume(train, begun, tmp_path / "a", "guided", *GUIDED))
    words = (*GUIDED, "--no-load-optim", "--no-load-rng")
    anew = check_ran(resume(train, begun, tmp_path / "b", "guided", *words))
    assert [row["step"] for row in anew.rows] == [1, 2, 3, 4]
    assert anew.rows[2]["loss"] == usual.rows[2]["loss"]
    assert anew.rows[3]["loss"] != usual.rows[3]["loss"]


def test_a_requeued_job_repeats_what_was_for_its_start(
    train: Train, begun: Path, tmp_path: Path
) -> None:
    """--load L --ckpt-step N --no-load-optim --save S: once S has a checkpoint, they are over."""
    words = (*GUIDED, "--load", str(begun / "guided"), "--ckpt-step", "2", "--no-load-optim")
    check_ran(train(tmp_path / "on", *words, steps=3, keep=True))
    again = check_ran(train(tmp_path / "on", *words, steps=5, keep=True))
    assert "at iteration 3" in again.logs[0]
    straight = check_ran(train(tmp_path / "straight", *words, steps=5, keep=True))
    last = [
        {k: v for k, v in run.rows[-1].items() if "second" not in k} for run in (again, straight)
    ]
    assert last[0] == last[1]


@pytest.mark.parametrize("flags", [(), ("--sgd-momentum", "0"), ("--bf16",)])
def test_plain_descent_resumes(train: Train, tmp_path: Path, flags: tuple[str, ...]) -> None:
    words = ("--tsft-objective", "sft", "--optimizer", "sgd", *flags)
    check_ran(train("stopped", *words, steps=2, keep=True))
    stopped = check_ran(train("stopped", *words, steps=4, keep=True))
    straight = check_ran(train("straight", *words, steps=4, keep=True))
    for key in ("loss", "grad_norm"):
        assert [row[key] for row in stopped.rows] == [row[key] for row in straight.rows]


@pytest.mark.parametrize("kind", ["train", "base/hf", "hf"])
def test_a_save_folder_of_another_kind(train: Train, world: World, kind: str) -> None:
    before = sorted(path.name for path in (world.root / kind).iterdir())
    run = train(world.root / kind, "--tsft-objective", "sft", steps=2)
    assert run.codes == [2] and "name another folder" in run.error, run.logs[0]
    assert sorted(path.name for path in (world.root / kind).iterdir()) == before
