"""A run that stops, by plan or by kill -9, and starts again is the run that never stopped, bit for
bit."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from megatron_tsft.checkpoint.convert import export_hf
from tests.training.runs import BATCH, REPOSITORY, Train, World, check_ran, step_values, weights

GUIDED = ("--tsft-teacher", "reference")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "second", "flags"),
    [
        (1, 1, ()),
        (
            2,
            1,
            ("--use-distributed-optimizer",),
        ),  # the number of data-parallel ranks changes in the middle of an epoch
        (2, 2, ("--pipeline-model-parallel-size", "2", "--bf16")),
    ],
    ids=["one-rank", "dp2-to-dp1", "pp2-bf16"],
)
def test_resume_equals_not_stopping(
    train: Train, world: World, first: int, second: int, flags: tuple[str, ...]
) -> None:
    start = (*GUIDED, *flags, "--tsft-eval-data", str(world.held), "--eval-interval", "4")
    straight = check_ran(train("straight", *start, ranks=first, steps=6, keep=True))
    stopped = check_ran(
        train(
            "stopped",
            *start,
            "--save-interval",
            "3",
            "--exit-interval",
            "3",
            ranks=first,
            steps=6,
            keep=True,
        )
    )
    assert [row["step"] for row in stopped.rows] == [1, 2, 3]
    resumed = check_ran(
        train("stopped", *start, "--save-interval", "6", ranks=second, steps=6, keep=True)
    )
    assert [row["step"] for row in resumed.rows] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in resumed.heldout] == [4, 6]
    if first == second:
        assert step_values(resumed.rows) == step_values(straight.rows)
        assert resumed.heldout == straight.heldout
        assert weights(resumed.save, 6) == weights(straight.save, 6)
    else:  # other ranks add in another order
        for ours, theirs in zip(resumed.rows, straight.rows, strict=True):
            assert ours["tokens"] == theirs["tokens"]
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
            assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)


@pytest.mark.slow
def test_the_own_checkpoint_wins_over_where_the_run_started(train: Train, tmp_path: Path) -> None:
    """A requeued job repeats its command line: --load L --finetune --save S must go on from S, not
    begin again."""
    first = check_ran(train("first", "--tsft-objective", "sft", steps=2, keep=True))
    start = ("--tsft-objective", "dft", "--load", str(first.save), "--finetune")
    check_ran(train("second", *start, steps=3, keep=True))
    again = check_ran(train("second", *start, steps=5, keep=True))
    assert "at iteration 3" in again.logs[0]
    assert [row["step"] for row in again.rows] == [1, 2, 3, 4, 5]

    other = train("second", "--tsft-objective", "dft", "--lr", "2e-3", steps=6, keep=True)
    assert other.codes == [2] and "--lr" in other.error and "--finetune" in other.error


@pytest.mark.slow
def test_kill_9_loses_nothing(train: Train, world: World, tmp_path: Path) -> None:
    save = tmp_path / "killed"
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "1",
        "--rdzv-backend",
        "c10d",
    ]
    command += ["--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1", "-m"]
    command += [
        "megatron_tsft.training.pretrain_gpt",
        "--tsft-model",
        str(world.base),
        "--tsft-data",
        str(world.train),
    ]
    command += [
        *BATCH.split(),
        "--tsft-device",
        "cpu",
        *GUIDED,
        "--save",
        str(save),
        "--train-iters",
        "400",
    ]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    log = (tmp_path / "killed.log").open("wb")
    process = subprocess.Popen(
        [*command, "--save-interval", "5"],
        env=environment,
        stdout=log,
        stderr=log,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 600
        metrics = save / "metrics.jsonl"
        while (
            not metrics.exists() or metrics.read_text().count("\n") < 8
        ):  # a checkpoint at 5, steps beyond it
            assert process.poll() is None and time.monotonic() < deadline, Path(
                log.name
            ).read_text()[-3000:]
            time.sleep(0.05)
    finally:
        # torchrun puts its ranks into sessions of their own:
        # each is killed by its id, whatever it is doing
        for victim in (*psutil.Process(process.pid).children(recursive=True), process):
            victim.kill()
        process.wait()
        log.close()
    with metrics.open("a") as file:
        file.write('{"step": 9, "lo')  # the worst place to die in
    step = int((save / "latest_checkpointed_iteration.txt").read_text())
    resumed = check_ran(train("killed", *GUIDED, steps=step + 4, keep=True))
    straight = check_ran(train("straight", *GUIDED, steps=step + 4))
    assert [row["step"] for row in resumed.rows] == list(range(1, step + 5))
    assert step_values(resumed.rows) == step_values(straight.rows)
    assert re.fullmatch(r"\d+", (save / "latest_checkpointed_iteration.txt").read_text())

    # what was trained leaves as a Hugging Face model, from the run's own folder
    import transformers

    export_hf(save, tmp_path / "hf", progress=False)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(str(tmp_path / "hf"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(tmp_path / "hf"))
    prompt = tokenizer("w1 w2 w3 plus is", return_tensors="pt", add_special_tokens=False)
    out = model.generate(prompt["input_ids"], max_new_tokens=3, do_sample=False, pad_token_id=2)
    assert out.shape[1] == prompt["input_ids"].shape[1] + 3
    base = transformers.AutoModelForCausalLM.from_pretrained(str(world.hf))
    assert not torch.equal(
        model.model.layers[0].mlp.up_proj.weight, base.model.layers[0].mlp.up_proj.weight
    )
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["vocab_size"] == 67
