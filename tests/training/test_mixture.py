"""Several data sets in one run, each with its objective, one of them on a schedule: real runs,
counted by hand."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_tsft.data.blend import BlendedPacks
from megatron_tsft.data.pack_writer import IGNORED
from megatron_tsft.data.packed_dataset import PackedDataset
from megatron_tsft.data.prepare import prepare
from megatron_tsft.data.prepared import PreparedData
from tests.training.runs import Run, Train, World, check_ran, write_rows

STEPS, BATCH_PACKS, SEQ_LENGTH, SEED = 6, 4, 64, 1234  # as in runs.BATCH; Megatron's default seed
ETA = [0.0, 0.125, 0.25, 0.375, 0.5, 0.5]  # linear:0:0.5:4, step by step; in fp32 exact
Shares = tuple[float, float]
SHARES: Shares = (0.7, 0.3)
RARE: Shares = (0.9, 0.1)  # some steps have no pack of the second
VALUES = ("loss", "nll", "gamma")


@pytest.fixture(scope="session")
def weighted(world: World) -> Path:
    """Rows with critical spans and weights of their own; some weigh nothing."""
    rows = write_rows(world.root / "weighted.jsonl", 40, 2)
    lines = [json.loads(line) for line in rows.read_text().splitlines()]
    for i, line in enumerate(lines):
        line |= {
            "weight": (0.5, 2.0, 0.0)[i % 3],
            "critical": [[0, 6]],
        }  # of 3 words and more, the first two
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    prepare(rows, world.hf, world.root / "weighted", progress=False)
    return world.root / "weighted"


def mixture_flags(
    world: World, weighted: Path, eta: str = "linear:0:0.5:4", shares: Shares = SHARES
) -> list[str]:
    data = [f"{world.train}:{shares[0]}:target-sft,eta={eta}", f"{weighted}:{shares[1]}:critical"]
    return ["--tsft-data", *data, "--tsft-teacher", "reference"]


def packs_of_step(world: World, weighted: Path, shares: Shares, step: int) -> list[dict[str, Any]]:
    """The packs of a 0-based step: which data set, how many supervised tokens, the sum of their
    weights."""
    members = [
        PackedDataset(
            PreparedData.load(folder), seq_length=SEQ_LENGTH, global_batch_size=1, seed=SEED
        )
        for folder in (world.train, weighted)
    ]
    blend = BlendedPacks(members, shares)
    packs = []
    for index in range(step * BATCH_PACKS, (step + 1) * BATCH_PACKS):
        item = blend[index]
        supervised = item["labels"] != IGNORED
        weights = (
            item["token_weights"][supervised].sum() if "token_weights" in item else supervised.sum()
        )
        packs.append(
            {
                "member": int(item["dataset"]),
                "tokens": int(supervised.sum()),
                "weight": float(weights),
            }
        )
    return packs


def without_clock(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in row.items() if key != "tokens_per_second"} for row in rows
    ]


def assert_same(ours: Run, theirs: Run, what: str) -> None:
    """Every number of every step, to what another order of adding leaves of fp32."""
    assert len(ours.rows) == len(theirs.rows)
    for mine, other in zip(without_clock(ours.rows), without_clock(theirs.rows), strict=True):
        assert mine.keys() == other.keys()
        for key, value in other.items():
            assert mine[key] == pytest.approx(value, rel=3e-5, abs=1e-7), (what, mine["step"], key)


def assert_adds_up(run: Run, world: World, weighted: Path, shares: Shares) -> None:
    """Values of each data set against the totals, tokens and weights against the packs
    themselves."""
    for row in run.rows:
        packs = packs_of_step(world, weighted, shares, row["step"] - 1)
        for member, name in enumerate(("train", "weighted")):
            assert row[f"tokens/{name}"] == sum(
                pack["tokens"] for pack in packs if pack["member"] == member
            )
        assert row["tokens"] == row["tokens/train"] + row["tokens/weighted"]
        mean = sum(pack["weight"] for pack in packs) / row["tokens"]
        assert row["weight"] == pytest.approx(mean, rel=1e-6)
        there = [name for name in ("train", "weighted") if row[f"tokens/{name}"]]
        for key in VALUES:
            total = sum(row[f"{key}/{name}"] * row[f"tokens/{name}"] for name in there)
            assert total / row["tokens"] == pytest.approx(row[key], rel=1e-5), (row["step"], key)
            assert all(
                (row[f"{key}/{name}"] is None) == (name not in there)
                for name in ("train", "weighted")
            )
        if "weighted" in there:
            assert row["gamma/weighted"] == 1  # critical trusts the label, whatever it weighs
        assert 0 < row["gamma/train"] < 1  # target-sft: the label's probability


@pytest.mark.slow
def test_values_of_each_data_set_add_up_in_every_layout(
    train: Train, world: World, weighted: Path
) -> None:
    flags = mixture_flags(world, weighted)
    alone = check_ran(train("alone", *flags, steps=STEPS))
    assert [row["step"] for row in alone.rows] == list(range(1, STEPS + 1))
    assert [row["eta/train"] for row in alone.rows] == ETA
    assert all(row["tokens/train"] and row["tokens/weighted"] for row in alone.rows)
    assert_adds_up(alone, world, weighted, SHARES)

    layouts = {
        "pp2": (2, "--pipeline-model-parallel-size 2"),
        "tp2": (2, "--tensor-model-parallel-size 2"),
        "dp2": (2, ""),
        "fused": (1, "--tsft-fuse-head"),
    }
    for name, (ranks, layout) in layouts.items():
        assert_same(
            check_ran(train(name, *flags, *layout.split(), ranks=ranks, steps=STEPS)), alone, name
        )

    # the comparison would mean nothing if eta did not
    # matter: the reference differs from the second step on
    still = check_ran(train("still", *mixture_flags(world, weighted, "constant:0"), steps=STEPS))
    assert still.rows[0]["grad_norm"] == alone.rows[0]["grad_norm"]  # both are at eta 0
    assert abs(still.rows[-1]["loss/train"] / alone.rows[-1]["loss/train"] - 1) > 1e-2


@pytest.mark.slow
def test_a_step_without_one_of_the_data_sets(train: Train, world: World, weighted: Path) -> None:
    run = check_ran(train("rare", *mixture_flags(world, weighted, shares=RARE), steps=4))
    assert {bool(row["tokens/weighted"]) for row in run.rows} == {False, True}
    assert_adds_up(run, world, weighted, RARE)


@pytest.mark.slow
def test_a_mixture_resumes(train: Train, world: World, weighted: Path) -> None:
    flags = mixture_flags(world, weighted)
    straight = check_ran(train("straight", *flags, steps=6))
    stop = ("--save-interval", "3", "--exit-interval", "3")
    stopped = check_ran(train("stopped", *flags, *stop, steps=6, keep=True))
    assert [row["step"] for row in stopped.rows] == [1, 2, 3]
    resumed = check_ran(train("stopped", *flags, "--save-interval", "1000", steps=6))
    assert "at iteration 3" in resumed.logs[0]
    assert [row["eta/train"] for row in resumed.rows] == ETA
    assert without_clock(resumed.rows) == without_clock(straight.rows)


@pytest.mark.slow
def test_a_schedule_of_the_only_data_set(train: Train, world: World) -> None:
    guided = ("--tsft-teacher", "reference", "--lr", "3e-3", "--tsft-args")
    moving = check_ran(train("moving", *guided, "eta=linear:0:0.5:4", steps=STEPS))
    assert [row["eta"] for row in moving.rows] == ETA
    assert not any("/" in key or key == "weight" for row in moving.rows for key in row)

    # a schedule that stands still is the number
    number = check_ran(train("number", *guided, "eta=0.5"))
    still = check_ran(train("still", *guided, "eta=constant:0.5"))
    rows = without_clock(still.rows)
    assert [row.pop("eta") for row in rows] == [0.5] * 3
    assert rows == without_clock(number.rows)
    assert abs(moving.rows[2]["loss"] / number.rows[2]["loss"] - 1) > 1e-4


@pytest.mark.slow
def test_weights_of_the_only_data_set(train: Train, weighted: Path) -> None:
    """`weight` is there without a mixture too, and is what the loss was multiplied with."""
    run = check_ran(train("only", "--tsft-objective", "sft", "--tsft-data", str(weighted), steps=2))
    data = PackedDataset(
        PreparedData.load(weighted), seq_length=SEQ_LENGTH, global_batch_size=BATCH_PACKS, seed=SEED
    )
    for row in run.rows:
        items = [
            data[index]
            for index in range((row["step"] - 1) * BATCH_PACKS, row["step"] * BATCH_PACKS)
        ]
        tokens = sum(int((item["labels"] != IGNORED).sum()) for item in items)
        weight = sum(
            float(item["token_weights"][item["labels"] != IGNORED].sum()) for item in items
        )
        assert row["tokens"] == tokens and row["weight"] == pytest.approx(weight / tokens, rel=1e-6)
        assert row["gamma"] == 1 and row["loss"] < row["nll"]


@pytest.mark.slow
def test_what_does_not_fit_is_refused(train: Train, world: World, weighted: Path) -> None:
    plain, heavy, none = str(world.train), str(weighted), ("--tsft-teacher", "none")
    cases: dict[str, tuple[list[str], list[str]]] = {
        "critical-without-weights": (
            ["--tsft-data", f"{heavy}:0.5:sft", f"{plain}:0.5:critical"],
            ["critical", "token_weights", f"{plain}: give", "prepare them again"],
        ),
        "teacher-that-nobody-reads": (
            [
                "--tsft-data",
                f"{plain}:0.5:sft",
                f"{heavy}:0.5:critical",
                "--tsft-teacher",
                "reference",
            ],
            ["critical, sft", "ignores the teacher", "--tsft-teacher none"],
        ),
        "args-that-nobody-reads": (
            ["--tsft-data", f"{plain}:0.5:sft", f"{heavy}:0.5:critical", "--tsft-args", "eta=0.5"],
            ["every --tsft-data has its own objective", "--tsft-args"],
        ),
        "objective-that-nobody-reads": (
            ["--tsft-data", f"{plain}:0.5:sft", f"{heavy}:0.5:critical", "--tsft-objective", "dft"],
            ["every --tsft-data has its own objective", "--tsft-objective"],
        ),
        "one-member-needs-a-teacher": (
            ["--tsft-data", f"{plain}:0.5:sft", f"{heavy}:0.5:asft", *none],
            ["asft", "needs a teacher", "--tsft-teacher reference"],
        ),
        "a-schedule-that-ends-with-a-teacher": (
            ["--tsft-args", "eta=linear:0:0.5:100", *none],
            ["target-sft", "needs a teacher", "--tsft-teacher reference"],
        ),
        "a-schedule-that-begins-with-a-teacher": (
            ["--tsft-args", "eta=cosine:0.5:0:100", *none],
            ["target-sft", "needs a teacher", "--tsft-teacher reference"],
        ),
        "a-schedule-that-leaves-the-range": (
            ["--tsft-args", "eta=linear:0:1.5:100", "--tsft-teacher", "reference"],
            ["--tsft-args", "eta=1.5", "from 0 to 1"],
        ),
        "no-schedule": (
            ["--tsft-args", "eta=linear:0:0.5", "--tsft-teacher", "reference"],
            ["'linear:0:0.5'", "kind:from:to:steps"],
        ),
        "an-objective-that-is-none": (
            ["--tsft-data", f"{plain}:0.5:sft", f"{heavy}:0.5:sfd"],
            [f"--tsft-data {heavy}", "'sfd'", "target-sft"],
        ),
        "a-share-that-is-none": (
            ["--tsft-data", f"{plain}:0"],
            [f"{plain}:0", "'0' is no positive number"],
        ),
        "a-folder-twice": (
            ["--tsft-data", f"{plain}:0.5:sft", f"{plain}:0.5:dft"],
            [plain, "twice"],
        ),
    }
    for name, (flags, parts) in cases.items():
        run = train(name, *flags)
        assert run.codes == [2], (name, run.logs[0][-2000:])
        assert all(part in run.error for part in parts), (name, run.error)
        assert "Traceback" not in run.logs[0] and not run.save.exists(), name


@pytest.mark.slow
def test_check_prints_each_member(train: Train, world: World, weighted: Path) -> None:
    run = check_ran(train("plan", *mixture_flags(world, weighted), "--tsft-check"))
    log = run.logs[0]
    assert "objective: target-sft, eta=linear:0:0.5:4," in log and "objective: critical," in log
    assert "70% of the packs" in log and "30% of the packs" in log
    assert "60 conversations" in log and "40 conversations" in log and not run.save.exists()
