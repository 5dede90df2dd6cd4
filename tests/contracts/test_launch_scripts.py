"""Every shipped shell script parses, and the launchers put together the commands that their help
promises."""

import argparse
import os
import re
import shlex
import subprocess
import warnings
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
LAUNCH = REPOSITORY / "launch" / "pretrain_gpt_tsft.sh"
SLURM = REPOSITORY / "launch" / "slurm_pretrain_gpt_tsft.sbatch"
PRESETS = sorted(
    (REPOSITORY / "launch" / "presets").glob("*.sh")
)  # data that the launcher reads, no scripts
SCRIPTS = sorted(
    path
    for folder in ("launch", "examples", "tools", "benchmarks", "dev", ".ci")
    for path in (REPOSITORY / folder).rglob("*")
    if (path.suffix in (".sh", ".sbatch") or path == REPOSITORY / ".ci" / "run")
    and path not in PRESETS
)
REQUIRED = {"MODEL": "base", "DATA": "data/train", "SAVE": "runs/a", "TRAIN_ITERS": "40"}
CPU = REQUIRED | {"DEVICE": "cpu"}


def start(
    script: Path, *arguments: str, cwd: Path | str = REPOSITORY, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run a script with nothing in its environment but PATH, DRY_RUN=1 and `variables`."""
    environment = {"PATH": os.environ["PATH"], "DRY_RUN": "1"} | variables
    return subprocess.run(
        ["bash", str(script), *arguments],
        env=environment,
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=60,
    )


def command(*arguments: str, cwd: Path | str = REPOSITORY, **variables: str) -> list[str]:
    """The words of the command that a dry run prints."""
    done = start(LAUNCH, *arguments, cwd=cwd, **variables)
    assert done.returncode == 0, done.stderr
    return shlex.split(done.stdout)


def value(words: list[str], flag: str) -> str:
    """What follows a flag; the last one wins, as in argparse."""
    return words[len(words) - words[::-1].index(flag)]


def test_there_are_scripts() -> None:
    assert {LAUNCH, SLURM, REPOSITORY / "examples" / "quickstart" / "run.sh"} <= set(SCRIPTS)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_it_parses_and_can_be_run(script: Path) -> None:
    done = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert script.read_text().startswith("#!/usr/bin/env bash\n")
    assert "set -euo pipefail" in script.read_text()
    assert os.access(script, os.X_OK) or script.suffix == ".sbatch"


@pytest.mark.parametrize(
    "script", [s for s in SCRIPTS if s.suffix == ".sh"], ids=lambda path: path.name
)
def test_help_has_an_example(script: Path, tmp_path: Path) -> None:
    done = start(script, "--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "example" in done.stdout


def test_defaults_on_one_cpu_node(tmp_path: Path) -> None:
    words = command(cwd=tmp_path, **CPU)
    module = words.index("megatron_tsft.training.pretrain_gpt")
    torchrun, flags = words[:module], words[module:]
    assert torchrun[1:4] == ["-m", "megatron_tsft.commands.torchrun", "--nproc-per-node"]
    assert value(torchrun, "--nproc-per-node") == "1"
    assert value(torchrun, "--rdzv-endpoint").endswith(":0") and "--master-port" not in torchrun
    expected = {
        "--tsft-model": "base",
        "--tsft-data": "data/train",
        "--save": "runs/a",
        "--train-iters": "40",
        "--tsft-device": "cpu",
        "--lr": "1e-5",
        "--min-lr": "1e-06",
        "--save-interval": "200",
    }
    assert {flag: value(flags, flag) for flag in expected} == expected
    assert not {
        "--bf16",
        "--use-distributed-optimizer",
        "--sequence-parallel",
        "--tsft-eval-data",
        # the entry point's defaults hold
        "--tsft-objective",
        "--tsft-args",
        "--tsft-teacher",
    } & set(flags)


def test_variables_reach_their_flags() -> None:
    words = command(
        **CPU
        | {
            "TP": "3",
            "PP": "2",
            "CP": "1",
            "MBS": "2",
            "GBS": "4",
            "SEQ_LENGTH": "128",
            "LR": "1e-4",
            "MIN_LR": "3e-5",
        }
        | {
            "OBJECTIVE": "idft",
            "OBJECTIVE_ARGS": "weight_min=0.2 weight_max=0.9",
            "EVAL_DATA": "data/held out",
        }
        | {
            "EVAL_INTERVAL": "7",
            "SAVE_INTERVAL": "5",
            "WARMUP_ITERS": "3",
            "DTYPE": "bf16",
            "SEQUENCE_PARALLEL": "1",
        }
        | {
            "ADAM_BETA2": "0.99",
            "WEIGHT_DECAY": "0.1",
            "CLIP_GRAD": "0.5",
            "LR_DECAY_STYLE": "constant",
            "SEED": "5",
        }
    )
    expected = {
        "--nproc-per-node": "6",
        "--tensor-model-parallel-size": "3",
        "--pipeline-model-parallel-size": "2",
        "--context-parallel-size": "1",
        "--micro-batch-size": "2",
        "--global-batch-size": "4",
        "--seq-length": "128",
        "--lr": "1e-4",
        "--min-lr": "3e-5",
        "--tsft-objective": "idft",
        "--tsft-eval-data": "data/held out",
        "--eval-interval": "7",
        "--save-interval": "5",
        "--lr-warmup-iters": "3",
        "--adam-beta2": "0.99",
        "--weight-decay": "0.1",
        "--clip-grad": "0.5",
        "--lr-decay-style": "constant",
        "--seed": "5",
    }
    assert {flag: value(words, flag) for flag in expected} == expected
    at = words.index("--tsft-args")
    assert words[at + 1 : at + 3] == ["weight_min=0.2", "weight_max=0.9"]
    assert {"--bf16", "--sequence-parallel"} <= set(words)
    assert "--tsft-teacher" not in words


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("OBJETIVE", "OBJECTIVE"),
        ("OBJECTVIE", "OBJECTIVE"),
        ("TRAIN_ITER", "TRAIN_ITERS"),
        ("TEACHER_CASHE", "TEACHER_CACHE"),
        ("WEIGHTDECAY", "WEIGHT_DECAY"),
    ],
)
def test_a_mistyped_variable_is_named(name: str, meant: str) -> None:
    done = start(LAUNCH, **CPU | {"DRY_RUN": "1", name: "x"})
    assert done.returncode == 2 and done.stdout == ""
    words = f"error: {name} is no variable of this launcher (did you mean {meant}?)"
    assert done.stderr.startswith(words) and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "name", ["MODELS", "HOME", "LEARNING", "SLURM_GPUS_PER_NODE", "LD_PRELOAD"]
)
def test_other_variables_are_let_alone(name: str) -> None:
    assert start(LAUNCH, **CPU | {"DRY_RUN": "1", name: ""}).returncode == 0


def test_the_help_and_the_check_of_names_know_the_same_variables() -> None:
    listed = re.search(r'^KNOWN="([^"]*)"', LAUNCH.read_text(encoding="utf-8"), re.M)
    assert listed is not None
    lines = start(LAUNCH, "--help").stdout.split("\nexamples\n")[0].splitlines()
    # a line of the help begins with its variables, or says after a semicolon what others are
    heads = [re.match(r"  ((?:[A-Z][A-Z0-9_]+(?:, )?)+)", line) for line in lines]
    first = {name for head in heads if head for name in head[1].rstrip(", ").split(", ")}
    known = set(listed[1].split())
    assert first <= known
    assert all(any(name in line for line in lines) for name in known)


def test_gpus_get_what_a_cluster_run_wants() -> None:
    words = command(**REQUIRED | {"DEVICE": "cuda", "GPUS_PER_NODE": "8", "TP": "2"})
    wanted = {
        "--bf16",
        "--use-distributed-optimizer",
        "--overlap-grad-reduce",
        "--sequence-parallel",
    }
    assert wanted <= set(words)
    assert value(words, "--nproc-per-node") == "8"


def test_several_nodes() -> None:
    nodes = {
        "NUM_NODES": "2",
        "NODE_RANK": "1",
        "MASTER_ADDR": "node0",
        "MASTER_PORT": "7000",
        "GPUS_PER_NODE": "8",
    }
    words = command(**REQUIRED | nodes | {"DEVICE": "cuda"})
    expected = {
        "--nnodes": "2",
        "--node-rank": "1",
        "--master-addr": "node0",
        "--master-port": "7000",
    }
    assert {flag: value(words, flag) for flag in expected} == expected


def test_extra_arguments_come_last_and_keep_their_spaces(tmp_path: Path) -> None:
    data = tmp_path / "my data"
    data.mkdir()
    words = command("--lr", "3e-6", "--tsft-plugin", "my file.py", **CPU | {"DATA": str(data)})
    assert words[-4:] == ["--lr", "3e-6", "--tsft-plugin", "my file.py"]
    assert value(words, "--lr") == "3e-6"
    assert value(words, "--tsft-data") == str(data)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"MODEL": ""}, "MODEL is not set"),
        ({"TRAIN_ITERS": ""}, "TRAIN_ITERS is not set"),
        ({"TRAIN_ITERS": "many"}, "TRAIN_ITERS=many is not a whole number"),
        ({"DEVICE": "tpu"}, "DEVICE=tpu: cuda or cpu"),
        ({"DTYPE": "fp8"}, "DTYPE=fp8"),
        (
            {"DTYPE": "fp32", "GRAD_REDUCE": "bf16"},
            "GRAD_REDUCE=bf16 goes with DTYPE=bf16, which is fp32",
        ),
        ({"GRAD_REDUCE": "fp8"}, "GRAD_REDUCE=fp8: fp32 or bf16"),
        ({"PRESET": "h100"}, f"PRESET=h100: one of {', '.join(path.stem for path in PRESETS)}\n"),
        ({"PRESET": "../presets/h100-bf16"}, "PRESET=../presets/h100-bf16: one of"),
        ({"PRESET": "h100-bf16"}, "PRESET=h100-bf16 is for GPUs: leave it out with DEVICE=cpu"),
        ({"TP": "3", "GPUS_PER_NODE": "4"}, "4 processes are not a multiple of TP*PP*CP"),
        (
            {"GPUS_PER_NODE": "3", "GBS": "32"},
            "GBS=32 is not a multiple of MBS * data parallel = 1 * 3",
        ),
        ({"NUM_NODES": "2", "GPUS_PER_NODE": "1"}, "MASTER_ADDR is not set"),
        ({"NUM_NODES": "2", "GPUS_PER_NODE": "1", "MASTER_ADDR": "a"}, "NODE_RANK is not set"),
        (
            {"NUM_NODES": "2", "GPUS_PER_NODE": "1", "MASTER_ADDR": "a", "NODE_RANK": "2"},
            "NODE_RANK=2",
        ),
    ],
)
def test_a_mistake_is_one_line(change: dict[str, str], message: str) -> None:
    done = start(LAUNCH, **CPU | change)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert message in done.stderr


GPUS = REQUIRED | {"DEVICE": "cuda", "GPUS_PER_NODE": "8"}


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_a_preset_is_data(preset: Path) -> None:
    """A line that says what it is, then variables that the user's environment wins over, and one
    array of flags."""
    first, *rest = preset.read_text().splitlines()
    assert first.startswith("# ")
    before = rest[: rest.index("PRESET_ARGS=(")]
    assert before and all(re.fullmatch(r"([A-Z_]+)=\$\{\1:-\w+\}", line) for line in before)
    assert rest[-1] == ")" and all(
        re.fullmatch(r"  --[-\w ]+", line) for line in rest[len(before) + 1 : -1]
    )


def test_help_lists_the_presets() -> None:
    listed = [line.split(maxsplit=1) for line in start(LAUNCH, "--help").stdout.splitlines()]
    for preset in PRESETS:
        assert [preset.stem, preset.read_text().splitlines()[0].removeprefix("# ")] in listed


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_a_preset_adds_its_flags_and_takes_none_away(preset: Path) -> None:
    """Beside what GPUs get anyway, in front of the user's own flags."""
    plain, words = command(**GPUS), command("--lr", "3e-6", **GPUS | {"PRESET": preset.stem})
    text = preset.read_text()
    own = (
        text[text.index("PRESET_ARGS=(") :].removeprefix("PRESET_ARGS=(").rsplit(")", 1)[0].split()
    )
    at = words.index("--bf16")
    assert words[at + 1 : at + 2 + len(own)] == ["--grad-reduce-in-bf16", *own]
    assert words[: at + 1] + words[at + 2 + len(own) :] == [*plain, "--lr", "3e-6"]


def test_variables_and_flags_win_over_a_preset() -> None:
    fp8 = GPUS | {"PRESET": "h100-fp8-delayed"}
    assert "--grad-reduce-in-bf16" not in command(**fp8 | {"GRAD_REDUCE": "fp32"})
    assert {"--fp16", "--fp8-format"} <= set(command(**fp8 | {"DTYPE": "fp16"}))
    assert not {"--bf16", "--grad-reduce-in-bf16"} & set(command(**fp8 | {"DTYPE": "fp16"}))
    words = command("--attention-backend", "auto", "--fp8-recipe", "tensorwise", **fp8)
    assert (value(words, "--attention-backend"), value(words, "--fp8-recipe")) == (
        "auto",
        "tensorwise",
    )


def test_every_megatron_flag_exists() -> None:
    """What the launcher passes beside --tsft-* is known to the installed Megatron (presets:
    test_presets.py)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Megatron says at import what is not installed
        from megatron.training.arguments import add_megatron_arguments
    known = add_megatron_arguments(
        argparse.ArgumentParser(allow_abbrev=False)
    )._option_string_actions
    variables = REQUIRED | {"DEVICE": "cuda", "GPUS_PER_NODE": "8", "TP": "2", "EVAL_DATA": "e"}
    words = command(**variables)
    flags = [
        word
        for word in words[words.index("megatron_tsft.training.pretrain_gpt") :]
        if word.startswith("--")
    ]
    assert len(flags) > 20
    assert [flag for flag in flags if not flag.startswith("--tsft-") and flag not in known] == []


def test_slurm_starts_one_launcher_a_node(tmp_path: Path) -> None:
    """The real script between stand-ins for SLURM's two programs: each task sees its own rank and
    the first node."""
    (tmp_path / "scontrol").write_text("#!/usr/bin/env bash\nprintf 'alpha\\nbeta\\n'\n")
    (tmp_path / "srun").write_text(
        "#!/usr/bin/env bash\nwhile [[ $1 == --* ]]; do shift; done\nfor i in 0 1; do"
        ' SLURM_NODEID=$i "$@"; done\n'
    )
    for name in ("scontrol", "srun"):
        (tmp_path / name).chmod(0o755)
    slurm = {
        "SLURM_JOB_NODELIST": "[alpha,beta]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_ID": "123",
    }
    slurm |= {"SLURM_GPUS_ON_NODE": "h100:4(S:0-1)", "SLURM_SUBMIT_DIR": str(REPOSITORY)}
    variables = REQUIRED | slurm | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "DEVICE": "cuda"}
    done = start(SLURM, "--lr", "2e-5", cwd=tmp_path, **variables)
    assert done.returncode == 0, done.stderr
    first, second = (shlex.split(line) for line in done.stdout.splitlines())
    for rank, words in enumerate((first, second)):
        expected = {
            "--nnodes": "2",
            "--node-rank": str(rank),
            "--master-addr": "alpha",
            "--nproc-per-node": "4",
        }
        assert {flag: value(words, flag) for flag in expected} == expected
        assert words[-2:] == ["--lr", "2e-5"]
    assert value(first, "--master-port") == value(second, "--master-port") == "20123"
