"""One checkpoint, every layout: the same losses and gradient norms, guided by a teacher that differs."""

from pathlib import Path

import pytest

from tests.training.runs import Run, Server, Train, World, check_ran

GUIDED = ("--tsft-teacher", "reference", "--tsft-args", "eta=0.5")


@pytest.fixture(scope="session")
def student(server: Server, world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint trained 20 steps from the base: a reference teacher then differs from the student."""
    save = tmp_path_factory.mktemp("student") / "save"
    argv = ["--tsft-model", str(world.base), "--tsft-data", str(world.train), "--tsft-device", "cpu"]
    argv += "--tsft-objective sft --seq-length 64 --micro-batch-size 2 --global-batch-size 4".split()
    argv += "--lr 3e-3 --lr-decay-style constant --train-iters 20".split()
    log = save.parent / "log"
    codes = server.run(1, [*argv, "--save", str(save)], log, 120)
    check_ran(Run(codes, [Path(f"{log}.0").read_text()], save))
    return save


def from_student(student: Path) -> tuple[str, ...]:
    return ("--load", str(student), "--finetune")


LAYOUTS = {
    "tp2": (2, "--tensor-model-parallel-size 2"),
    "tp2-sp": (2, "--tensor-model-parallel-size 2 --sequence-parallel"),
    "pp2": (2, "--pipeline-model-parallel-size 2"),
    "vpp2": (2, "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1"),
    "dp2": (2, ""),
    "dp2-distributed-optimizer": (2, "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"),
    "micro-batch-1": (1, "--micro-batch-size 1"),
    "micro-batch-4": (1, "--micro-batch-size 4"),
    "recompute": (1, "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"),
    # the head inside the loss: hidden states and weight instead of logits, student's and teacher's
    "fused": (1, "--tsft-fuse-head"),
    "fused-tp2-sp": (2, "--tsft-fuse-head --tensor-model-parallel-size 2 --sequence-parallel"),
    "fused-pp2": (2, "--tsft-fuse-head --pipeline-model-parallel-size 2"),
    "fused-dp2-distributed-optimizer": (
        2,
        "--tsft-fuse-head --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather",
    ),
    "tp2-pp2-sp": (4, "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --sequence-parallel"),
}
KEYS = ("loss", "nll", "gamma", "entropy", "kl", "grad_norm")


@pytest.mark.slow
def test_every_layout_takes_the_same_steps(train: Train, student: Path, world: World) -> None:
    start = (*from_student(student), *GUIDED, "--tsft-eval-data", str(world.held), "--eval-interval", "3")
    alone = check_ran(train("tp1", *start))
    assert len(alone.rows) == 3 and alone.heldout[0]["step"] == 3
    for name, (ranks, flags) in LAYOUTS.items():
        run = check_ran(train(name, *start, *flags.split(), ranks=ranks))
        for ours, theirs in zip(run.rows + run.heldout, alone.rows + alone.heldout, strict=True):
            assert ours["tokens"] == theirs["tokens"]
            for key in KEYS:
                if key in theirs:
                    assert ours[key] == pytest.approx(theirs[key], rel=3e-5), (name, ours["step"], key)

    # the comparison above would mean nothing if the teacher did not matter
    for name, flags in {
        "eta-0": (*start, "--tsft-args", "eta=0"),
        "teacher-is-student": (*GUIDED, "--tsft-model", str(exported(student))),
    }.items():
        other = check_ran(train(name, *flags))
        for key in ("loss", "grad_norm"):
            difference = abs(other.rows[0][key] / alone.rows[0][key] - 1)
            assert difference > 1e-2, (name, key, difference)


def exported(student: Path) -> Path:
    """The student as a base of its own: its weights exported to Hugging Face and imported again."""
    from megatron_tsft.checkpoint.convert import export_hf, import_hf

    hf, base = student.parent / "hf", student.parent / "base"
    if not base.exists():
        export_hf(student, hf, progress=False)
        import_hf(hf, base, progress=False)
    return base
