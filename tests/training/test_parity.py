"""One checkpoint, every layout: the same losses and gradient norms to five digits, guided by a
reference that differs.

Packed data, four steps over the masked end of an epoch into the next one, and an evaluation. A cell
runs with the plain head, the fused one or both (matrix.py); with TSFT_MATRIX=FILE all run with both
and the figures are written there: docs/parallelism.md shows those of docs/benchmark/matrix.json.
"""

import collections
import functools
import itertools
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_tsft.checkpoint.convert import export_hf, import_hf
from tests.training.matrix import CELLS, FUSED, MODELS, heads_of, kinds_of
from tests.training.runs import Run, Server, Train, World, check_ran, make_hf

STEPS, PACKS = 4, 8
GUIDED = ("--tsft-teacher", "reference", "--tsft-args", "eta=0.5")
COMMON = (
    f"--micro-batch-size 1 --global-batch-size {PACKS} --tsft-document-multiple 8 --lr 1e-4".split()
)
KEYS = ("loss", "nll", "gamma", "entropy", "kl", "grad_norm")
Starts = Callable[[str], tuple[str, ...]]
Alone = Callable[[str], Run]


@pytest.fixture(scope="module")
def starts(server: Server, world: World, tmp_path_factory: pytest.TempPathFactory) -> Starts:
    """starts(model): flags of a run from weights that were trained 20 steps, with the untrained
    ones as reference."""

    @functools.cache
    def make(model: str) -> tuple[str, ...]:
        root = tmp_path_factory.mktemp(model)
        architecture, config = MODELS[model]
        import_hf(make_hf(root / "hf", architecture, **config), root / "base", progress=False)
        argv = [
            "--tsft-model",
            str(root / "base"),
            "--tsft-data",
            str(world.train),
            "--tsft-device",
            "cpu",
        ]
        argv += ["--tsft-objective", "sft", "--seq-length", "64"]
        argv += "--micro-batch-size 2 --global-batch-size 4".split()
        argv += "--lr 3e-3 --lr-decay-style constant --train-iters 20".split()
        codes = server.run(1, [*argv, "--save", str(root / "save")], root / "log", 600)
        check_ran(Run(codes, [Path(f"{root / 'log'}.0").read_text()], root / "save"))
        evaluate = ("--tsft-eval-data", str(world.held), "--eval-interval", str(STEPS))
        return (
            "--tsft-model",
            str(root / "base"),
            "--load",
            str(root / "save"),
            "--finetune",
            *COMMON,
            *evaluate,
        )

    return make


@pytest.fixture(scope="module")
def alone(
    train_in: Callable[[Path], Train], starts: Starts, tmp_path_factory: pytest.TempPathFactory
) -> Alone:
    """alone(model): the run of one rank."""

    @functools.cache
    def run(model: str) -> Run:
        folder = tmp_path_factory.mktemp("alone")
        found = check_ran(train_in(folder)(model, *starts(model), *GUIDED, steps=STEPS))
        assert len(found.rows) == STEPS and found.heldout[0]["step"] == STEPS
        assert (
            found.rows[2]["tokens"] < 0.8 * found.rows[0]["tokens"]
        )  # the masked end of the epoch
        return found

    return run


@pytest.fixture(scope="module")
def record() -> Iterator[list[dict[str, Any]]]:
    """Rows for docs; written when all cells have run."""
    rows: list[dict[str, Any]] = []
    yield rows
    if file := os.environ.get("TSFT_MATRIX"):
        Path(file).write_text(json.dumps(rows, indent=1) + "\n")


def figures(name: str, flags: str, ranks: int, run: Run, farthest: float) -> dict[str, Any]:
    """One row for docs."""
    steps = [{key: row[key] for key in ("loss", "grad_norm", "tokens")} for row in run.rows]
    heldout = run.heldout[0]["nll"]
    return {
        "cell": name,
        "flags": flags,
        "ranks": ranks,
        "steps": steps,
        "heldout": heldout,
        "difference": farthest,
    }


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_the_teacher_matters(
    train: Train,
    starts: Starts,
    alone: Alone,
    record: list[dict[str, Any]],
    tmp_path: Path,
    model: str,
) -> None:
    """Without it, or with the student as its own, losses differ: else the comparison of layouts
    would mean little."""
    run = alone(model)
    record.append(figures(f"{model}, one rank", "", 1, run, 0.0))
    start = starts(model)
    save = Path(start[3])
    export_hf(save, tmp_path / "hf", progress=False)
    import_hf(tmp_path / "hf", tmp_path / "base", progress=False)
    for name, flags in {
        "eta-0": (*start, *GUIDED, "--tsft-args", "eta=0"),
        "own-teacher": (*COMMON, *GUIDED, "--tsft-model", str(tmp_path / "base")),
    }.items():
        other = check_ran(train(name, *flags, steps=1))
        for key in ("loss", "grad_norm"):
            difference = abs(other.rows[0][key] / run.rows[0][key] - 1)
            assert difference > 1e-2, (name, key, difference)


def test_both_heads_meet_every_kind() -> None:
    """Each model and each flag is tried with both heads, and so are any two of them that stand in
    two cells or more."""
    together = collections.defaultdict[tuple[str, ...], list[tuple[bool, ...]]](list)
    for name, cell in CELLS.items():
        kinds = sorted(kinds_of(cell))
        for pair in itertools.chain(((kind,) for kind in kinds), itertools.combinations(kinds, 2)):
            together[pair].append(heads_of(name))
    for pair, heads in together.items():
        if len(pair) == 1 or len(heads) >= 2:
            assert {head for each in heads for head in each} == {False, True}, pair


# what docs/parallelism.md shows is measured with both heads everywhere
TRIED = [
    pytest.param(name, fused, id=f"{name}-{'fused' if fused else ''}")
    for name in CELLS
    for fused in ((False, True) if "TSFT_MATRIX" in os.environ else heads_of(name))
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "fused"), TRIED)
def test_every_layout_takes_the_same_steps(
    train: Train, starts: Starts, alone: Alone, record: list[dict[str, Any]], name: str, fused: bool
) -> None:
    cell = CELLS[name]
    flags = f"{cell.flags} {FUSED}".strip() if fused else cell.flags
    run = check_ran(
        train("cell", *starts(cell.model), *GUIDED, *flags.split(), ranks=cell.ranks, steps=STEPS)
    )
    one, farthest = alone(cell.model), 0.0
    for ours, theirs in zip(run.rows + run.heldout, one.rows + one.heldout, strict=True):
        assert ours["tokens"] == theirs["tokens"]
        for key in KEYS:
            if key in theirs:
                farthest = max(farthest, abs(ours[key] / theirs[key] - 1))
                assert ours[key] == pytest.approx(theirs[key], rel=1e-5), (ours["step"], key)
    record.append(
        figures(f"{name}, fused head" if fused else name, flags, cell.ranks, run, farthest)
    )
