"""examples/sft_own_data.sh on a JSONL and a model of the user's own: torchrun, two ranks, a Hugging
Face model."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.training.runs import REPOSITORY, make_hf, write_rows


@pytest.mark.slow
def test_own_data_end_to_end(tmp_path: Path) -> None:
    hf, out = make_hf(tmp_path / "my model"), tmp_path / "my run"
    rows = write_rows(tmp_path / "rows.jsonl", 60, 0, weight=2.0)
    variables = {
        "HF": str(hf),
        "DATA": str(rows),
        "HELDOUT": str(write_rows(tmp_path / "held.jsonl", 13, 1)),
    }
    variables |= {
        "OUT": str(out),
        "SEQ_LENGTH": "64",
        "GBS": "4",
        "LR": "1e-3",
        "TRAIN_ITERS": "6",
        "TP": "2",
    }
    variables |= {"DEVICE": "cpu", "OMP_NUM_THREADS": "1", "PYTHON": sys.executable}

    def start(*flags: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", str(REPOSITORY / "examples" / "sft_own_data.sh"), *flags],
            env=os.environ | variables,
            capture_output=True,
            text=True,
            timeout=300,
        )

    done = start("--sequence-parallel")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    metrics = [
        json.loads(line) for line in (out / "checkpoint" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [row["step"] for row in metrics if "split" not in row] == [1, 2, 3, 4, 5, 6]
    heldout = [row for row in metrics if row.get("split") == "heldout"]
    assert [row["step"] for row in heldout] == [6]

    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(str(out / "hf"))
    base = transformers.AutoModelForCausalLM.from_pretrained(str(hf))
    assert model.config.to_dict() | {"_name_or_path": ""} == base.config.to_dict() | {
        "_name_or_path": ""
    }
    assert not torch.equal(model.lm_head.weight, base.lm_head.weight)
    # it stops where the data's turns end, and writes as the data is written
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(out / "hf"))
    stops = model.generation_config.eos_token_id
    assert tokenizer.eos_token_id in (stops if isinstance(stops, list) else [stops])
    template = transformers.AutoTokenizer.from_pretrained(str(hf)).chat_template
    assert tokenizer.chat_template == template

    variables["TRAIN_ITERS"] = "8"  # started again it goes on
    done = start("--sequence-parallel")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    metrics = [
        json.loads(line) for line in (out / "checkpoint" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [row["step"] for row in metrics if "split" not in row] == list(range(1, 9))
    assert (out / "checkpoint" / "latest_checkpointed_iteration.txt").read_text() == "8"

    for name, path in (
        ("DATA", write_rows(tmp_path / "others.jsonl", 60, 3)),
        ("HF", make_hf(tmp_path / "another", num_hidden_layers=2)),
    ):
        done = start_with(start, variables, name, str(path))
        assert done.returncode == 2, done.stderr
        last = done.stderr.strip().splitlines()[-1]
        assert "was made of another" in last and "name another OUT" in last
    assert len((out / "checkpoint" / "metrics.jsonl").read_text().splitlines()) == len(metrics)


def start_with(
    start: Callable[[], subprocess.CompletedProcess[str]],
    variables: dict[str, str],
    name: str,
    value: str,
) -> subprocess.CompletedProcess[str]:
    """Start with one variable changed."""
    before, variables[name] = variables[name], value
    try:
        return start()
    finally:
        variables[name] = before
