"""What a run reads: every conversation once an epoch, each epoch in its own order, with whatever
ranks it resumes."""

import itertools
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_tsft.data.packed_dataset import PackedDataset
from megatron_tsft.data.prepared import PreparedData
from megatron_tsft.errors import UserError
from megatron_tsft.plan.layout import Batch
from megatron_tsft.plan.packs import DataSet, PackRules, Packs
from megatron_tsft.plan.same_packs import SAVED, Resumed, check_same_packs, facts_of_packs
from tests.training.runs import Train, World, check_ran

OPTIONS = "--micro-batch-size 1 --global-batch-size 8 --tsft-document-multiple 4 --lr 1e-5".split()
GUIDED = ("--tsft-teacher", "reference", "--tsft-args", "eta=0.5")
CP2, DISTRIBUTED = ("--context-parallel-size", "2"), ("--use-distributed-optimizer",)


def packs_of(world: World, size: int, multiple: int = 1) -> PackedDataset:
    data = PreparedData.load(world.train)
    return PackedDataset(
        data, seq_length=64, global_batch_size=size, seed=1234, document_multiple=multiple
    )


def steps(
    packs: PackedDataset, ranks: int, micro: int, size: int, consumed: int
) -> Iterator[list[int]]:
    """The packs of each step from `consumed` on, by Megatron's own sampler on every data-parallel
    rank."""
    from megatron.training.datasets.data_samplers import MegatronPretrainingSampler

    samplers = [
        iter(MegatronPretrainingSampler(len(packs), consumed, micro, rank, ranks))
        for rank in range(ranks)
    ]
    while True:
        yield [
            index
            for s in samplers
            for part in itertools.islice(s, size // (micro * ranks))
            for index in part
        ]


@pytest.mark.parametrize(("first", "second"), [(2, 1), (1, 2), (4, 2), (2, 4)])
@pytest.mark.parametrize("micro", [1, 2])
def test_a_resume_with_other_ranks_reads_exactly_what_is_left(
    world: World, first: int, second: int, micro: int
) -> None:
    size, stop = 8, 2
    packs = packs_of(world, size)
    an_epoch = packs.packs_per_epoch // size
    assert (
        0 < packs.packs_per_epoch - packs.packs < size and an_epoch > stop
    )  # ragged, and stopped in the middle
    before = list(itertools.islice(steps(packs, first, micro, size, 0), stop))
    after = list(
        itertools.islice(steps(packs, second, micro, size, stop * size), 3 * an_epoch - stop)
    )
    straight = list(itertools.islice(steps(packs, 1, micro, size, 0), 3 * an_epoch))
    assert [sorted(step) for step in before + after] == [sorted(step) for step in straight]
    every = Counter(range(len(packs.data)))
    epochs = []
    for epoch in range(3):
        read = [
            row
            for step in (before + after)[epoch * an_epoch : (epoch + 1) * an_epoch]
            for i in step
            for row in packs.rows(i)
        ]
        assert Counter(read) == every
        epochs.append(read)
    assert epochs[0] != epochs[1] != epochs[2]  # shuffled anew
    left = Counter(row for step in after[: an_epoch - stop] for i in step for row in packs.rows(i))
    assert left == every - Counter(row for step in before for i in step for row in packs.rows(i))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "second"),
    [
        ((2, DISTRIBUTED), (1, DISTRIBUTED)),
        ((2, (*CP2, *DISTRIBUTED)), (2, DISTRIBUTED)),
        ((1, ()), (2, CP2)),
    ],
    ids=["dp2-to-dp1", "cp2-to-dp2", "one-to-cp2"],
)
def test_a_run_goes_on_in_another_layout(
    train: Train,
    world: World,
    first: tuple[int, tuple[str, ...]],
    second: tuple[int, tuple[str, ...]],
) -> None:
    """Two steps in one layout, four in another, over the masked end of an epoch: the steps of a run
    that never stopped, each over the supervised tokens that its packs hold."""
    ranks, flags = first
    check_ran(
        train(
            "run",
            *OPTIONS,
            *GUIDED,
            *flags,
            "--exit-interval",
            "2",
            ranks=ranks,
            steps=6,
            keep=True,
        )
    )
    ranks, flags = second
    resumed = check_ran(
        train(
            "run",
            *OPTIONS,
            *GUIDED,
            *flags,
            "--save-interval",
            "9",
            ranks=ranks,
            steps=6,
            keep=True,
        )
    )
    assert "at iteration 2" in resumed.logs[0]
    straight = check_ran(train("straight", *OPTIONS, *GUIDED, steps=6))
    packs = packs_of(world, 8, 4)
    assert packs.packs_per_epoch == 24 and packs.packs < 24
    for step, (ours, theirs) in enumerate(zip(resumed.rows, straight.rows, strict=True)):
        held = sum(packs.supervised_tokens(index) for index in range(8 * step, 8 * step + 8))
        assert ours["tokens"] == theirs["tokens"] == held
        for key in ("loss", "nll", "grad_norm"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-5), (step, key)


@pytest.mark.slow
def test_other_packs_are_refused(train: Train, world: World) -> None:
    start = ("--tsft-objective", "sft", *OPTIONS)
    check_ran(train("run", *start, steps=1, keep=True))
    for flags, words in {
        "--seq-length 128": "was trained with --seq-length 64",
        "--seed 1": "was trained with --seed 1234",
        "--tsft-document-multiple 8": "Pass --tsft-document-multiple 4, or start anew",
        f"--tsft-data {world.held}": "was trained on other --tsft-data",
        f"--tsft-data {world.train}:1 {world.held}:1": "was trained on other --tsft-data, or with"
        " other shares",
    }.items():
        other = train("run", *start, *flags.split(), steps=2, keep=True)
        assert other.codes == [2] and words in other.error and "--finetune" in other.error, (
            flags,
            other.error,
        )
    # without the optimizer's state the place in the data still comes from the checkpoint
    folder = check_ran(train("run", *start, steps=1, keep=True)).save
    other = train("other", *start, "--load", str(folder), "--no-load-optim", "--seed", "7", steps=2)
    assert other.codes == [2] and "was trained with --seed 1234" in other.error
    again = check_ran(train("run", *start, steps=2, keep=True))
    assert [row["step"] for row in again.rows] == [1, 2]


@pytest.mark.slow
def test_the_way_out_that_a_refusal_names_works(train: Train) -> None:
    start = ("--tsft-objective", "sft", *OPTIONS, "--tsft-document-multiple")
    for multiple, context, fits in (("0", "2", "1"), ("4", "4", "1 or 2")):
        save = f"run{multiple}"
        check_ran(train(save, *start, multiple, "--exit-interval", "1", steps=2, keep=True))
        wide = ("0", "--context-parallel-size", context)
        run = train(save, *start, *wide, ranks=int(context), steps=2, keep=True)
        then = multiple if multiple != "0" else "1"
        words = (
            f"are cut for --context-parallel-size {fits}: pass it and --tsft-document-multiple"
            f" {then}, or start"
        )
        assert 2 in run.codes and words in run.error, run.error
        size = fits.split()[-1]
        flags = (then, "--context-parallel-size", size)
        run = check_ran(train(save, *start, *flags, ranks=int(size), steps=2, keep=True))
        assert [row["step"] for row in run.rows] == [1, 2]


def run_of(world: World, members: int = 1, seed: int = 1234, multiple: int = 1) -> Packs:
    """The packs of a run with batches of 8."""
    data = PreparedData.load(world.train)
    rules = PackRules(seq_length=64, seed=seed, document_multiple=multiple, long_samples="refuse")
    return Packs([DataSet(data, 1.0, False)] * members, None, rules, Batch(8, 8))


def test_a_batch_size_may_change_within_the_first_epoch(world: World) -> None:
    assert 16 < run_of(world).members[0].packs <= 24

    def check(consumed: int, now: int, members: int = 1) -> None:
        packs = run_of(world, members)
        before: dict[str, Any] = {"global_batch_size": 8, "consumed_train_samples": consumed}
        before[SAVED] = facts_of_packs(packs)
        check_same_packs(Resumed(Path("run/iter_0000009"), "run", before), packs, now, 1)

    check(16, 20)  # 40 packs an epoch instead of 24
    check(240, 8)
    check(240, 12)  # 24 as well
    check(240, 20, members=2)  # a mixture's epochs are not filled up
    with pytest.raises(
        UserError,
        match="trained with --global-batch-size 8, now it is 20: .* Pass .*-size 8, or start",
    ):
        check(32, 20)


def test_a_checkpoint_of_an_earlier_version(world: World) -> None:
    """It does not say what data it saw, and had no padded conversations."""
    resumed = Resumed(Path("run/iter_0000009"), "run", {"seq_length": 64, "seed": 1234})
    check_same_packs(resumed, run_of(world), 8, 1)
    other = {"--tsft-document-multiple 1": run_of(world, multiple=4)}
    other["--seed 1234"] = run_of(world, seed=7)
    for flag, packs in other.items():
        with pytest.raises(UserError, match=f"trained with {flag}"):
            check_same_packs(resumed, packs, 8, 1)
