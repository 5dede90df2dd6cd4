"""Students and teachers with experts: the same step as dense autograd through transformers, in
every pipeline."""

from pathlib import Path

import pytest

from tests.training.runs import Cache, Train, World, check_ran, make_moe
from tests.training.test_teacher_layouts import HELD, WHOLE, cached, online, same_rows
from tests.training.test_teachers import LAYOUTS, Dense, agrees


@pytest.fixture(scope="module")
def experts(world: World) -> Path:
    """An imported Qwen3-MoE with the tokenizer of the other models."""
    from megatron_tsft.checkpoint.convert import import_hf

    import_hf(make_moe(world.root / "experts_hf"), world.root / "experts", progress=False)
    return world.root / "experts"


@pytest.mark.slow
def test_a_student_with_experts(
    train: Train, world: World, teacher: Path, experts: Path, cache: Cache
) -> None:
    dense = Dense(world.train, world.root / "experts_hf", world.root / "teacher_hf")
    start = (*WHOLE, "--tsft-model", str(experts))
    for name, flags in LAYOUTS.items():
        agrees(
            train(name, *start, *online(teacher), *flags.split(), ranks=2, steps=1),
            "target-sft",
            dense,
        )
    folder = cache(teacher)
    known = Dense(world.train, world.root / "experts_hf", None, folder)
    agrees(train("cached", *start, *cached(folder), steps=1), "target-sft", known)


@pytest.mark.slow
def test_a_teacher_with_experts(train: Train, world: World, experts: Path, cache: Cache) -> None:
    """Beside a dense student, whose flags know nothing of experts; and asked for a cache."""
    dense = Dense(world.train, world.hf, world.root / "experts_hf")
    for name, flags in LAYOUTS.items():
        agrees(
            train(name, *WHOLE, *online(experts), *flags.split(), ranks=2, steps=1),
            "target-sft",
            dense,
        )
    megatron, transformers = cache(experts), cache(world.root / "experts_hf")
    ours, theirs = (
        check_ran(train(f.name, *WHOLE, *cached(f), steps=1)) for f in (megatron, transformers)
    )
    same_rows(ours, theirs, 1e-4)


@pytest.mark.slow
def test_pipelines_evaluation_and_resume(
    train: Train, world: World, teacher: Path, experts: Path
) -> None:
    start = (
        "--tsft-model",
        str(experts),
        *online(teacher),
        *HELD,
        str(world.held),
        "--eval-interval",
        "2",
    )
    alone = check_ran(train("alone", *start, steps=4, keep=True))
    vpp2 = "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1".split()
    check_ran(train("halves", *start, *vpp2, "--exit-interval", "2", ranks=2, steps=4, keep=True))
    same_rows(check_ran(train("halves", *start, *vpp2, ranks=2, steps=4, keep=True)), alone)


@pytest.mark.slow
def test_what_does_not_go_with_experts(train: Train, teacher: Path, experts: Path) -> None:
    flag = "--moe-token-dispatcher-type allgather"
    run = train("no", "--tsft-model", str(experts), *online(teacher), *flag.split())
    assert run.codes == [2] and flag in run.error


def test_round_trip(world: World, experts: Path, tmp_path: Path) -> None:
    """Every tensor comes back bit by bit."""
    from safetensors.torch import load_file

    from megatron_tsft.checkpoint.convert import export_hf

    export_hf(experts, tmp_path / "hf", progress=False)
    ours, theirs = (
        {k: v for f in d.glob("*.safetensors") for k, v in load_file(f).items()}
        for d in (tmp_path / "hf", world.root / "experts_hf")
    )
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(theirs[name]) for name in theirs)
