"""--tsft-fuse-head trains as the plain head does: tied to the embedding or not, in fp32 and bf16,
in every layout."""

import json
from pathlib import Path

import pytest

from tests.training.runs import Run, Train, World, check_ran, make_hf

GUIDED = ("--tsft-teacher", "reference", "--tsft-args", "eta=0.5")


@pytest.fixture(scope="session")
def tied(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An imported model whose head is its embedding."""
    from megatron_tsft.checkpoint.convert import import_hf

    folder = tmp_path_factory.mktemp("tied")
    import_hf(make_hf(folder / "hf", tie_word_embeddings=True), folder / "base", progress=False)
    return folder / "base"


def same_steps(ours: Run, plain: Run, tolerance: float) -> None:
    assert len(ours.rows) == len(plain.rows) == 3
    for a, b in zip(ours.rows, plain.rows, strict=True):
        assert a["tokens"] == b["tokens"]
        for key in ("loss", "nll", "gamma", "entropy", "kl", "grad_norm"):
            if b[key] is None:  # gem's target is no distribution: no KL
                assert a[key] is None
            else:
                assert a[key] == pytest.approx(b[key], rel=tolerance), (
                    ours.save.name,
                    a["step"],
                    key,
                )


@pytest.mark.slow
def test_a_head_tied_to_the_embedding(train: Train, tied: Path) -> None:
    """The embedding's gradient arrives through autograd, the head's in main_grad: both count."""
    model = ("--tsft-model", str(tied), *GUIDED)
    plain = check_ran(train("plain", *model))
    layouts = {
        "fused": (1, ""),
        "fused-tp2": (2, "--tensor-model-parallel-size 2"),
        "fused-pp2": (
            2,
            "--pipeline-model-parallel-size 2",
        ),  # the head's copy of the embedding is on the last stage
        "fused-overlap": (
            2,
            "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather",
        ),
    }
    for name, (ranks, flags) in layouts.items():
        same_steps(
            check_ran(train(name, *model, "--tsft-fuse-head", *flags.split(), ranks=ranks)),
            plain,
            3e-5,
        )


@pytest.mark.slow
def test_bf16(train: Train) -> None:
    """bf16 logits are the same numbers in both; gradients are rounded in other places."""
    flags = ("--bf16", "--tsft-objective", "gem", "--tensor-model-parallel-size", "2")
    plain, fused = (check_ran(train(name, *flags, *more, ranks=2)) for name, more in RUNS.items())
    same_steps(fused, plain, 2e-2)
    first, other = fused.rows[0], plain.rows[0]
    for key in ("loss", "nll", "entropy"):
        assert first[key] == pytest.approx(other[key], rel=1e-5), key


RUNS = {"plain": (), "fused": ("--tsft-fuse-head",)}


@pytest.mark.slow
def test_evaluation_and_resume(train: Train, world: World) -> None:
    """A fused run evaluates, saves and resumes; a plain run may go on from its checkpoint."""
    start = (*GUIDED, "--tsft-eval-data", str(world.held))
    whole = check_ran(train("whole", *start, steps=4, keep=True))
    check_ran(train("halves", *start, "--tsft-fuse-head", steps=2, keep=True))
    halves = check_ran(train("halves", *start, steps=4, keep=True))
    for ours, theirs in zip(
        halves.rows + halves.heldout[-1:], whole.rows + whole.heldout[-1:], strict=True
    ):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=3e-5), json.dumps([ours, theirs])
