"""Everything that travels with a token is cut with it: each kind of teacher, weights, sequences,
mixtures over CP."""

from pathlib import Path

import pytest

from tests.training.runs import Cache, Run, Train, World, check_ran, write_rows

CP2 = "--context-parallel-size 2"
TP2_CP2 = f"{CP2} --tensor-model-parallel-size 2 --sequence-parallel"
PP2_CP2 = f"{CP2} --pipeline-model-parallel-size 2 --micro-batch-size 2"
LAYOUTS = {
    "cp2": (2, f"{CP2} --tsft-document-multiple 0"),
    "tp2-sp-cp2": (4, TP2_CP2),
    "pp2-cp2-fused": (4, f"{PP2_CP2} --tsft-fuse-head"),
}
# CP2 pads conversations to a multiple of 4 on its own (0 is the default); one rank has to be told
COMMON = "--micro-batch-size 1 --global-batch-size 4 --tsft-document-multiple 4 --lr 1e-4".split()
KEYS = ("loss", "nll", "gamma", "entropy", "kl", "grad_norm", "tokens", "weight")


def agree(ours: Run, theirs: Run) -> None:
    for mine, other in zip(ours.rows + ours.heldout, theirs.rows + theirs.heldout, strict=True):
        assert mine.keys() == other.keys()
        for key in other.keys() & {*KEYS, *(k for k in other if "/" in k)}:
            assert mine[key] == pytest.approx(other[key], rel=1e-5), (other["step"], key)


def same_steps(train: Train, *flags: str, layouts: dict[str, tuple[int, str]] = LAYOUTS) -> Run:
    """The run of one rank; the layouts' runs are the same."""
    alone = check_ran(train("alone", *COMMON, *flags))
    for name, (ranks, layout) in layouts.items():
        agree(check_ran(train(name, *COMMON, *flags, *layout.split(), ranks=ranks)), alone)
    return alone


@pytest.fixture(scope="module")
def weighted(world: World) -> Path:
    from megatron_tsft.data.prepare import prepare

    rows = write_rows(world.root / "important.jsonl", 30, 5, weight=0.7, critical=[[1, 6]])
    prepare(rows, world.hf, world.root / "important", progress=False)
    return world.root / "important"


@pytest.mark.slow
def test_sequences_span_the_ranks(train: Train, world: World, teacher: Path) -> None:
    """iw-sft's weight of a sequence is made of all its tokens, on whichever rank they are."""
    evaluate = ("--tsft-eval-data", str(world.held), "--eval-interval", "3")
    reference = ("--tsft-teacher", "model", "--tsft-teacher-load", str(teacher))
    run = same_steps(train, "--tsft-objective", "iw-sft", *reference, *evaluate)
    assert 0.1 < abs(run.rows[0]["gamma"] - 1) < 15  # neither everywhere 1 nor at the clip of 16


@pytest.mark.slow
def test_a_teacher_of_another_shape(train: Train, teacher: Path) -> None:
    same_steps(
        train,
        "--tsft-teacher",
        "model",
        "--tsft-teacher-load",
        str(teacher),
        "--tsft-args",
        "eta=0.5",
    )


@pytest.mark.slow
def test_a_cached_teacher(train: Train, teacher: Path, cache: Cache) -> None:
    same_steps(
        train,
        "--tsft-teacher",
        "cache",
        "--tsft-teacher-cache",
        str(cache(teacher)),
        "--tsft-args",
        "eta=0.5",
    )


@pytest.mark.slow
def test_weights_and_mixtures(train: Train, world: World, weighted: Path) -> None:
    mixed = [f"{world.train}:0.5:target-sft,eta=0.5", f"{weighted}:0.5:critical"]
    run = same_steps(train, "--tsft-data", *mixed, "--tsft-teacher", "reference")
    assert {"nll/train", "nll/important", "weight"} <= run.rows[0].keys()


@pytest.mark.slow
def test_documents_that_fill_a_whole_pack(train: Train, world: World) -> None:
    """One document as long as the pack: Megatron's rotary table then has a row for each of the
    pack's positions."""
    from megatron_tsft.data.prepare import prepare

    words = " ".join(f"w{i % 60}" for i in range(31))
    rows = world.root / "long.jsonl"
    rows.write_text(f'{{"prompt": "{words} is", "completion": " {words}"}}\n' * 3)
    prepare(rows, world.hf, world.root / "long", progress=False)
    run = same_steps(
        train,
        "--tsft-data",
        str(world.root / "long"),
        "--tsft-objective",
        "sft",
        layouts={"cp2": (2, CP2)},
    )
    assert run.rows[0]["tokens"] == 32 * 3
