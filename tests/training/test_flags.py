"""What does not fit stops before the first step, with exit status 2 and one line that says what to
change."""

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_tsft.data.prepare import prepare
from tests.training.runs import REPOSITORY, Train, World, make_hf, write_rows

CASES = {
    "objective needs a teacher": (
        1,
        "--tsft-objective asft --tsft-teacher none",
        ["asft", "needs a teacher", "--tsft-teacher reference"],
    ),
    "objective learns from its teacher alone": (
        1,
        "--tsft-objective kd",
        ["kd", "learns from it alone", "--tsft-teacher-load"],
    ),
    "objective almost known": (1, "--tsft-objective targt-sft", ["did you mean 'target-sft'?"]),
    "parameter almost known": (1, "--tsft-objective gem --tsft-args betta=1", ["'beta'?"]),
    "no ranks": (1, "--tensor-model-parallel-size 0", ["size 0: pass at least 1"]),
    "flag almost known": (
        1,
        "--tsft-objectve sft",
        ["--tsft-objectve", "did you mean '--tsft-objective'?"],
    ),
    "target-sft with eta needs one": (
        1,
        "--tsft-teacher none",
        ["eta=0.5", "--tsft-teacher reference", "eta=0"],
    ),
    "objective ignores its teacher": (
        1,
        "--tsft-objective sft --tsft-teacher reference",
        ["sft", "--tsft-teacher none"],
    ),
    "no weights": (
        1,
        "--tsft-objective critical",
        ["critical", "token_weights", "prepare them again"],
    ),
    "unknown objective": (1, "--tsft-objective sfd", ["'sfd'", "target-sft"]),
    "unknown parameter": (1, "--tsft-objective sft --tsft-args eta=1", ["'eta'", "it has none"]),
    "parameter out of range": (1, "--tsft-args eta=2", ["eta=2", "from 0 to 1"]),
    "parameter without a value": (1, "--tsft-args eta", ["'eta'", "name=number"]),
    "no such plugin": (1, "--tsft-plugin nowhere.py", ["--tsft-plugin", "nowhere.py"]),
    "TP and heads": (
        3,
        "--tensor-model-parallel-size 3 --tsft-args eta=0",
        ["3", "4 attention heads", "1, 2, 4"],
    ),
    "PP and layers": (3, "--pipeline-model-parallel-size 3 --tsft-args eta=0", ["3", "4 layers"]),
    "ranks": (3, "--tensor-model-parallel-size 2 --tsft-args eta=0", ["3 processes", "start 2"]),
    "batch": (1, "--global-batch-size 5 --tsft-args eta=0", ["5", "--micro-batch-size 2"]),
    "too long for the model": (1, "--seq-length 1024 --tsft-args eta=0", ["1024", "512 positions"]),
    "too long for a pack": (1, "--seq-length 16 --tsft-args eta=0", ["--seq-length", "truncate"]),
    "another architecture": (
        1,
        "--num-layers 5 --tsft-args eta=0",
        ["--num-layers says 5", "has 4"],
    ),
    "another norm": (
        1,
        "--norm-epsilon 1e-6 --tsft-args eta=0",
        ["--norm-epsilon", "1e-06", "1e-05"],
    ),
    "refused by name": (
        1,
        "--full-validation --tsft-args eta=0",
        ["--full-validation", "--tsft-eval-data"],
    ),
    "Megatron's data": (1, "--mock-data --tsft-args eta=0", ["--mock-data", "--tsft-data"]),
    "fp8 without Transformer Engine": (
        1,
        "--fp8-format hybrid --bf16 --tsft-args eta=0",
        ["Transformer Engine"],
    ),
    "Transformer Engine without it": (
        1,
        "--transformer-impl transformer_engine --tsft-args eta=0",
        ["--transformer-impl transformer_engine", "not installed"],
    ),
    "a head of another kind": (
        1,
        "--tsft-fuse-head --fp8-output-proj --tsft-args eta=0",
        ["--fp8-output-proj", "--tsft-fuse-head", "leave one of them out"],
    ),
    "torch's FSDP": (
        1,
        "--use-torch-fsdp2 --tsft-args eta=0",
        ["--use-torch-fsdp2", "--use-distributed-optimizer"],
    ),
    "Megatron's FSDP": (
        1,
        "--use-megatron-fsdp --tsft-args eta=0",
        ["--use-megatron-fsdp", "fsdp_dtensor"],
    ),
    "load finds nothing": (
        1,
        "--load nowhere --tsft-args eta=0",
        ["--load nowhere", "leave --load out"],
    ),
    "another rope": (
        1,
        "--rotary-seq-len-interpolation-factor 8 --tsft-args eta=0",
        ["another model"],
    ),
    "another attention": (
        1,
        "--window-size 4,0 --tsft-args eta=0",
        ["--window-size", "another model"],
    ),
    "Megatron's own data paths": (
        1,
        "--train-data-path x --tsft-args eta=0",
        ["--train-data-path", "--tsft-data"],
    ),
    "how much to evaluate": (1, "--eval-iters 1 --tsft-args eta=0", ["--eval-iters", "exact pass"]),
    "another format": (
        1,
        "--ckpt-format torch --tsft-args eta=0",
        ["--ckpt-format torch", "torch_dist"],
    ),
    "unknown flag": (
        1,
        "--tsft-objectiv sft",
        ["unrecognized arguments: --tsft-objectiv sft", "--help"],
    ),
    "no number": (1, "--lr fast", ["--lr", "'fast'"]),
    "no such model": (1, "--tsft-model nowhere", ["nowhere", "import"]),
    "no such data": (1, "--tsft-data nowhere", ["nowhere", "prepare_data"]),
    "Megatron refuses": (
        1,
        "--sequence-parallel --use-tp-pp-dp-mapping --tsft-args eta=0 --bf16 --fp16",
        ["Megatron refuses"],
    ),
}


@pytest.mark.slow
def test_it_stops_before_the_first_step(train: Train) -> None:
    for name, (ranks, flags, parts) in CASES.items():
        run = train(name.replace(" ", "-"), *flags.split(), ranks=ranks)
        assert run.codes[0] == 2 and 0 not in run.codes, (name, run.logs[0][-2000:])
        assert all(part in run.error for part in parts), (name, run.error)
        assert "Traceback" not in run.logs[0], name
        assert not run.save.exists(), name  # nothing was written
        assert all("error:" not in log for log in run.logs[1:]), name  # said once


@pytest.mark.slow
def test_data_of_another_tokenizer(train: Train, tmp_path: Path) -> None:
    other = make_hf(tmp_path / "other", vocab_size=70)
    file = other / "tokenizer.json"
    file.write_text(file.read_text().replace('"w59"', '"v59"'))
    prepare(write_rows(tmp_path / "rows.jsonl", 5, 0), other, tmp_path / "data", progress=False)
    run = train("tokenizer", "--tsft-data", str(tmp_path / "data"), "--tsft-args", "eta=0")
    assert run.codes == [2] and "another tokenizer" in run.error and "prepare_data.py" in run.error


@pytest.mark.slow
def test_saving_over_the_imported_model(train: Train, world: World) -> None:
    before = (world.base / "latest_checkpointed_iteration.txt").read_text()
    run = train("over", "--tsft-args", "eta=0", "--save", str(world.base))
    assert run.codes == [2] and "name another" in run.error
    assert (world.base / "latest_checkpointed_iteration.txt").read_text() == before


def test_help_megatron_lists_everything() -> None:
    command = [
        sys.executable,
        "-m",
        "megatron_tsft.training.pretrain_gpt",
        "--help-megatron",
        "--tsft-device",
        "cpu",
    ]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (
        "--tsft-objective" in done.stdout
        and "--moe-paged-stash-buffer-size-factor-cuda" in done.stdout
    )


@pytest.mark.slow
def test_a_save_folder_of_another_model(train: Train, world: World, tmp_path: Path) -> None:
    from megatron_tsft.checkpoint.card import copy_card
    from megatron_tsft.checkpoint.convert import import_hf

    base = tmp_path / "base2"
    import_hf(make_hf(tmp_path / "hf2", num_hidden_layers=2), base, progress=False)
    copy_card(base, tmp_path / "save2")
    run = train("save2", "--tsft-args", "eta=0")
    assert run.codes == [2] and "another model" in run.error


@pytest.mark.slow
def test_evaluation_data_without_weights_and_a_broken_plugin(
    train: Train, world: World, tmp_path: Path
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", 40, 0, critical=[[0, 3]])
    prepare(rows, world.hf, tmp_path / "weighted", progress=False)
    flags = ["--tsft-objective", "critical", "--tsft-data", str(tmp_path / "weighted")]
    run = train("weights", *flags, "--tsft-eval-data", str(world.held))
    assert run.codes == [2] and str(world.held) in run.error and "critical" in run.error
    rows = write_rows(tmp_path / "negative.jsonl", 40, 0, weight=-0.5)
    prepare(rows, world.hf, tmp_path / "negative", progress=False)
    run = train("negative", "--tsft-data", str(tmp_path / "negative"))
    assert run.codes == [2] and "has negative token weights, which 'target-sft'" in run.error
    (tmp_path / "plugin.py").write_text("import nowhere\n")
    run = train("plugin", "--tsft-plugin", str(tmp_path / "plugin.py"))
    assert run.codes == [2] and "ModuleNotFoundError" in run.error and "plugin.py" in run.error


@pytest.mark.slow
def test_check_prints_the_plan_and_writes_nothing(train: Train, world: World) -> None:
    run = train(
        "plan",
        "--tsft-check",
        "--tsft-teacher",
        "reference",
        "--tsft-eval-data",
        str(world.held),
        "--tensorboard-dir",
        str(world.root / "board"),
    )
    assert run.codes == [0]
    assert not (world.root / "board").exists() and "everything fits" in run.logs[0]
    assert (
        "60 conversations" in run.logs[0]
        and "steps an epoch" in run.logs[0]
        and "13 conversations" in run.logs[0]
    )
    assert not run.save.exists()
