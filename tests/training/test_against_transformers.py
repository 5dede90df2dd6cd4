"""The first step of Megatron's loop, packed, against transformers, one conversation at a time, in
plain autograd.

The step's batch is the whole data set, so the loop's loss, nll and gradient norm must be those of
the mean over all supervised tokens. Completion-only data: labels that were shifted across documents
would show.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.runs import Train, World, check_ran


def encoded(world: World, name: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(ids [n], supervised [n]) of every row, by the tokenizer alone: prompt, completion, end of
    sequence."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(world.hf))
    rows = []
    for line in (world.root / f"{name}.jsonl").read_text().splitlines():
        row = json.loads(line)
        prompt, completion = (
            tokenizer(row[key], add_special_tokens=False).input_ids
            for key in ("prompt", "completion")
        )
        ids = [*prompt, *completion, tokenizer.eos_token_id]
        rows.append((torch.tensor(ids), torch.arange(len(ids)) >= len(prompt)))
    return rows


def model_of(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32).eval()


def dense_step(
    student: Any, teacher: Any, rows: list[tuple[torch.Tensor, torch.Tensor]], eta: float | None
) -> dict:
    """Mean loss, mean nll and gradient norm; eta None is plain SFT, else Q = p_y onehot + (1 - p_y)
    pi, detached."""
    loss, nll, count = torch.zeros(()), torch.zeros(()), 0
    for ids, supervised in rows:
        log_p = torch.log_softmax(student(input_ids=ids[None, :-1]).logits[0], -1)  # [n-1, v]
        labels, wanted = ids[1:], supervised[1:]
        log_p_y = log_p.gather(1, labels[:, None])[:, 0]
        per_token = -log_p_y
        if eta is not None:
            with torch.no_grad():
                log_t = torch.log_softmax(teacher(input_ids=ids[None, :-1]).logits[0], -1)
                pi = torch.softmax((1 - eta) * log_p + eta * log_t, -1)
                p_y = log_p_y.exp()[:, None]
                q = p_y * torch.nn.functional.one_hot(labels, pi.shape[1]) + (1 - p_y) * pi
            per_token = -(q * log_p).sum(-1)
        loss = loss + per_token[wanted].sum()
        nll = nll - log_p_y[wanted].sum().detach()
        count += int(wanted.sum())
    (loss / count).backward()
    norm = torch.stack([p.grad.norm() for p in student.parameters() if p.grad is not None]).norm()
    return {
        "loss": float(loss.detach()) / count,
        "nll": float(nll) / count,
        "grad_norm": float(norm),
        "tokens": count,
    }


@pytest.mark.parametrize(
    ("ranks", "flags"), [(1, ()), (2, ("--tensor-model-parallel-size", "2"))], ids=["tp1", "tp2"]
)
def test_first_step_of_sft(train: Train, world: World, ranks: int, flags: tuple[str, ...]) -> None:
    expected = dense_step(model_of(world.hf), None, encoded(world, "train"), None)
    heldout = dense_step(model_of(world.hf), None, encoded(world, "held"), None)
    # 60 conversations fill fewer than 20 packs
    whole = "--global-batch-size 20 --tsft-objective sft".split()
    evaluate = [
        "--tsft-eval-data",
        str(world.held),
        "--eval-interval",
        "1",
        "--lr",
        "1e-12",
    ]  # the weights stay
    run = check_ran(train("sft", *whole, *evaluate, *flags, ranks=ranks, steps=1))
    assert " 1 steps an epoch" in run.logs[0]
    assert run.heldout[0]["tokens"] == heldout["tokens"]
    assert run.heldout[0]["nll"] == pytest.approx(heldout["nll"], rel=2e-5)
    for key, value in expected.items():
        assert run.rows[0][key] == pytest.approx(value, rel=2e-5), key
    assert run.rows[0]["gamma"] == 1.0


@pytest.mark.slow
def test_first_step_of_target_sft_with_a_teacher_that_differs(
    train: Train, world: World, tmp_path: Path
) -> None:
    from megatron_tsft.checkpoint.convert import export_hf

    trained = check_ran(
        train("trained", "--tsft-objective", "sft", "--lr", "3e-3", steps=20, keep=True)
    )
    export_hf(trained.save, tmp_path / "student", progress=False)
    rows = encoded(world, "train")
    expected = dense_step(model_of(tmp_path / "student"), model_of(world.hf), rows, 0.5)
    start = (
        "--load",
        str(trained.save),
        "--finetune",
        "--tsft-teacher",
        "reference",
        "--global-batch-size",
        "20",
    )
    for name, ranks, flags in (("one", 1, ""), ("pp2", 2, "--pipeline-model-parallel-size 2")):
        run = check_ran(train(name, *start, *flags.split(), ranks=ranks, steps=1))
        for key, value in expected.items():
            assert run.rows[0][key] == pytest.approx(value, rel=2e-5), (name, key)
