"""Every objective that takes a teacher, with each kind of teacher, against dense autograd of the
published definition.

The step's batch is the whole data set, so the loop's loss and gradient norm are those of the mean
over all supervised tokens. The teacher's weights differ from the student's, and for `model` and
`cache` so do its depth, width and heads.
"""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_tsft.data.prepared import PreparedData
from megatron_tsft.teacher.reader import CachedTeacher, TeacherCache
from tests.covering import met
from tests.loss.published import PUBLISHED, SURROGATE, Batch, sequence_log_ratio, topk_teacher
from tests.training.runs import Cache, Run, Train, World, check_ran

OBJECTIVES = ("target-sft", "sft-kl", "asft", "kd", "kd-hybrid", "gift", "iw-sft", "proximal")
LAYOUTS = {
    "tp2": "--tensor-model-parallel-size 2 --sequence-parallel",
    "pp2": "--pipeline-model-parallel-size 2",
}
KINDS = ("model", "cache", "reference")


def layouts_of(kind: str) -> list[tuple[str, str]]:
    """(layout, objective): every objective with a kind of teacher, the layouts by turns along both,
    so that any two of the three meet; what a layout does with an objective's loss does not depend
    on where the teacher's rows come from."""
    names = list(LAYOUTS)
    turn = KINDS.index(kind)
    return [(names[(i + turn) % len(names)], name) for i, name in enumerate(OBJECTIVES)]


def test_every_pair_is_met() -> None:
    rows = [(kind, *row) for kind in KINDS for row in layouts_of(kind)]
    assert met(rows, 2) == met(itertools.product(KINDS, LAYOUTS, OBJECTIVES), 2)


WHOLE = ("--global-batch-size", "20", "--lr", "1e-12")  # 60 conversations fill fewer than 20 packs
HELD = ("--eval-interval", "1", "--tsft-eval-data")


def load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    # the default of experts, a grouped product, has no fp64
    loaded = AutoModelForCausalLM.from_pretrained(
        str(folder), dtype=torch.float64, experts_implementation="eager"
    )
    return loaded.eval()


class Dense:
    """All supervised tokens of a data set, one conversation at a time through transformers in
    fp64."""

    def __init__(
        self,
        data: Path,
        student: Path,
        teacher: Path | None,
        cache: Path | None = None,
        tail: str = "uniform",
        columns: bool = False,
    ):
        """columns: the teacher has another vocabulary size; it is cut, or filled up with -inf, to
        the student's."""
        self.student, prepared = load(student), PreparedData.load(data)
        other = None if teacher is None else load(teacher)
        cached = None if cache is None else CachedTeacher([TeacherCache.load(cache)], prepared)
        parts: list[list[Tensor]] = []
        for row in range(len(prepared)):
            sample = prepared.row(row)
            ids = torch.tensor(sample.input_ids.tolist())
            wanted = torch.tensor(sample.loss_mask.tolist())[1:]
            labels = ids[1:][wanted]
            z = self.student(input_ids=ids[None, :-1]).logits[0][wanted]
            if cached is not None:
                rows = cached.rows(row)
                stored = (torch.tensor(rows.ids), torch.tensor(rows.logprobs), z.shape[1], tail)
                log_t = topk_teacher(*stored, tail_logmass=torch.tensor(rows.tail_logmass))
                log_ref = torch.tensor(rows.label_logp).double()
            else:
                assert other is not None
                with torch.no_grad():
                    logits = other(input_ids=ids[None, :-1]).logits[0][wanted]
                if columns:
                    shared = min(logits.shape[1], z.shape[1])
                    logits = torch.nn.functional.pad(
                        logits[:, :shared], (0, z.shape[1] - shared), value=-torch.inf
                    )
                log_t = torch.log_softmax(logits, -1)
                log_ref = log_t.gather(1, labels[:, None])[:, 0]
            parts.append([z, labels, log_t, log_ref, torch.full_like(labels, row)])
        z, y, log_t, log_ref, of = (torch.cat(values) for values in zip(*parts, strict=True))
        batch = Batch(z, y, log_t, log_ref)
        ratio = sequence_log_ratio(batch, of, torch.ones_like(of, dtype=torch.bool))
        self.batch = Batch(z, y, log_t, log_ref, ratio)

    def loss(self, objective: str) -> float:
        """Mean of the surrogate's value."""
        c_y, c_r, pi = SURROGATE[objective](self.batch.detached())
        value = c_y * self.batch.nll
        if pi is not None:
            value = value - c_r * (pi * self.batch.log_p).nan_to_num(0).sum(-1)
        return float(value.detach().mean())

    def grad_norm(self, objective: str) -> float:
        """Norm of the gradient of the published loss's mean."""
        self.student.zero_grad()
        PUBLISHED[objective](self.batch).mean().backward(retain_graph=True)
        return float(
            torch.stack(
                [p.grad.norm() for p in self.student.parameters() if p.grad is not None]
            ).norm()
        )


@pytest.fixture(scope="module")
def dense() -> dict[tuple, Dense]:
    """What was computed before, by data, student, teacher and cache."""
    return {}


def agrees(run: Run, objective: str, train: Dense, held: Dense | None = None) -> None:
    first = check_ran(run).rows[0]
    assert first["tokens"] == len(train.batch.y)
    assert first["loss"] == pytest.approx(train.loss(objective), rel=3e-5)
    assert first["grad_norm"] == pytest.approx(train.grad_norm(objective), rel=1e-4)
    if held is not None:
        assert run.heldout[0]["tokens"] == len(held.batch.y)
        assert run.heldout[0]["loss"] == pytest.approx(held.loss(objective), rel=3e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "objective"), layouts_of("model"))
def test_a_model_of_another_shape(
    train: Train, world: World, teacher: Path, dense: dict, objective: str, layout: str
) -> None:
    for name in ("train", "held"):
        if name not in dense:
            dense[name] = Dense(world.root / name, world.hf, world.root / "teacher_hf")
    flags = (
        "--tsft-objective",
        objective,
        "--tsft-teacher",
        "model",
        "--tsft-teacher-load",
        str(teacher),
    )
    run = train(
        "run", *WHOLE, *flags, *HELD, str(world.held), *LAYOUTS[layout].split(), ranks=2, steps=1
    )
    agrees(run, objective, dense["train"], dense["held"])


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "objective"), layouts_of("cache"))
def test_a_cache(
    train: Train,
    world: World,
    teacher: Path,
    cache: Cache,
    dense: dict,
    objective: str,
    layout: str,
) -> None:
    """Made at TP 2, with packs of 128; read with packs of 64 and the tail that the flag says."""
    folder = cache(teacher, *LAYOUTS["tp2"].split(), "--batch-tokens", "128", ranks=2)
    tail = "drop" if layout == "tp2" else "uniform"
    for name in ("train", "held"):
        if (name, tail) not in dense:
            dense[name, tail] = Dense(world.root / name, world.hf, None, folder, tail)
    flags = (
        "--tsft-objective",
        objective,
        "--tsft-teacher",
        "cache",
        "--tsft-teacher-cache",
        str(folder),
    )
    flags += ("--tsft-teacher-tail", tail, *HELD, str(world.held))
    run = train("run", *WHOLE, *flags, *LAYOUTS[layout].split(), ranks=2, steps=1)
    agrees(run, objective, dense["train", tail], dense["held", tail])


@pytest.fixture(scope="module")
def student(server: Any, world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose weights have moved away from the imported model's; exported beside it as
    hf."""
    from megatron_tsft.checkpoint.convert import export_hf
    from tests.training.runs import BATCH

    save = tmp_path_factory.mktemp("student") / "save"
    argv = [
        "--tsft-model",
        str(world.base),
        "--tsft-data",
        str(world.train),
        "--tsft-device",
        "cpu",
        *BATCH.split(),
    ]
    argv += ["--save", str(save), "--train-iters", "20", "--lr", "3e-3", "--tsft-objective", "sft"]
    assert server.run(1, argv, save.with_suffix(".log"), 600) == [0]
    export_hf(save, save.parent / "hf", progress=False)
    return save


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "objective"), layouts_of("reference"))
def test_the_reference(
    train: Train, world: World, student: Path, dense: dict, objective: str, layout: str
) -> None:
    if "reference" not in dense:
        dense["reference"] = Dense(world.train, student.parent / "hf", world.hf)
    flags = (
        "--tsft-objective",
        objective,
        "--tsft-teacher",
        "reference",
        "--load",
        str(student),
        "--finetune",
    )
    run = train("run", *WHOLE, *flags, *LAYOUTS[layout].split(), ranks=2, steps=1)
    agrees(run, objective, dense["reference"])
