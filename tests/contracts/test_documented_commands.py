"""Every command that README.md, CONTRIBUTING.md, docs/ and the examples of --help show runs as it
stands.

Each runs in bash, from the root of a copy of the tracked files with their committed modes, in which
the folders that the pages name exist as tiny real ones. What would take a cluster or an hour is
made small, never rewritten: training runs get `--tsft-check` behind their own flags (which parses
and checks all of them for the number of ranks that the command asks for), a benchmark runs once,
with SMALLER, and its other commands are parsed, pytest collects only, make prints only.
"""

import contextlib
import functools
import json
import os
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.contracts import command_server
from tests.training.runs import REPOSITORY, make_hf, write_rows

PAGES = [
    REPOSITORY / "README.md",
    REPOSITORY / "CONTRIBUTING.md",
    *sorted(REPOSITORY.glob("docs/*.md")),
]
SHELL = ("bash", "sh", "shell", "console")
STARTS = re.compile(r"(\S*/\S+|make|source|python3?|torchrun|pip|git|sbatch|tsft-[a-z-]+)(\s|$)")
ASSIGNMENT = re.compile(r"[A-Z_]+=(\"[^\"]*\"|'[^']*'|\S*)\s+")

# the beginnings of lines in indented blocks that are no commands: formulas and what commands print
TEXT = (
    "Q = ",
    "Q    = ",
    "loss = ",
    "the models agree: ",
    "argmax at ",
)

# commands that must not run, with the reason; by their words. Each must still be shown.
NOT_RUN = {
    "benchmarks/convert.py": "starts three conversions; tests/checkpoint/test_checkpoint_memory.py",
    "dev/faults.py": "kills and races for an hour; tests/commands/test_faults.py",
    "MODEL=...": "is for the reader to complete",
}

# commands that a page shows because they are refused: what the last line says
REFUSED = {
    "--use-torch-fsdp2": "--use-torch-fsdp2",
}

# what makes a benchmark's run small; appended by the server, so that the last one counts
SMALLER = {
    "benchmarks/loss.py": "--device cpu --quick --repeat 1 --objectives sft --no-progress"
    " --implementations ours-torch",
    "benchmarks/step.py": "--parts steps --model tiny --objectives sft --dtypes fp32 --pairs 1"
    " --seq-length 16 --no-progress",
    "benchmarks/scaling.py": "--vocabulary 256 --vocabulary-tokens 8 --ranks 1 --tokens 16"
    " --columns 512 --repeat 1",
    "benchmarks/collectives.py": "--tp 2 --tokens 64 --columns 64 --repeat 1",
    "benchmarks/cache.py": "--repeat 1 --seq-length 256",
    "benchmarks/checksums.py": "--gigabytes 0.01 --repeat 1",
    "benchmarks/count_traffic.py": "--columns 4096",
    "benchmarks/prepare.py": "--chats 40 --repeat 1 --memory 50 100",
    "benchmarks/top_k.py": "--conversations 4 --no-progress",
}
RAN: set[str] = set()  # those of them that ran before in this process
# trains for real, because what follows needs the checkpoint
TRAINS = "examples/sft_own_data.sh"
SMALL_RUN = "--train-iters 1 --seq-length 64 --global-batch-size 2"
SLOW = (
    "benchmarks/step.py",
    "benchmarks/scaling.py",
    "benchmarks/collectives.py",
    "benchmarks/loss.py",
    TRAINS,
)

# a run to which a page's flags are added
ENTRY = (
    "python -m megatron_tsft.training.pretrain_gpt --tsft-device cpu --tsft-model base --tsft-data"
    " data/train --seq-length 64 --micro-batch-size 1 --train-iters 10 --lr 1e-5 --tsft-check"
)
LAUNCHER = {
    "MODEL": "base",
    "DATA": "data/train",
    "SAVE": "runs/a",
    "TRAIN_ITERS": "1000",
    "DEVICE": "cpu",
}
# a documented name is one of the tiny folders and files of `originals`
STAND_INS = {
    "models/Llama-3.2-1B": "hf",
    "SmolLM2-135M-Instruct": "hf",
    "SmolLM2-135M": "student",
    "SmolLM2-1.7B": "hf",
    "Qwen3-8B": "hf",
    "a": "student",
    "b": "hf",
    "models/Qwen3-0.6B": "hf",
    "Qwen-or-Llama-big": "hf",
    "Llama-3.1-70B": "hf",
    "hf": "student",
    "hf_base": "hf",
    "base": "base",
    "base_8b": "base",
    "teacher": "base",
    "base70b": "base",
    "runs/a": "base",
    "runs/my_run": "base",
    "chats.jsonl": "chats.jsonl",
    "train.jsonl": "chats.jsonl",
    "heldout.jsonl": "chats.jsonl",
    "my_objective.py": "my_objective.py",
    **dict.fromkeys(("train", "maths", "data/train", "data/heldout", "data/maths"), "data"),
    **dict.fromkeys(("chat", "data/chat"), "more"),
    "cache": "cache",
}


@dataclass(frozen=True)
class Command:
    """One command of a page, its continuation lines joined to it."""

    page: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(page: Path) -> Iterator[tuple[bool, list[tuple[int, str]]]]:
    """(indented, numbered lines) of each fenced shell block and each indented block."""
    found: list[tuple[int, str]] = []
    fence: str | None = None
    previous = ""
    lines = page.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate([*lines, ""], 1):
        if line.startswith("```"):
            if fence in SHELL:
                yield False, found
            fence, found = (line[3:].strip() if fence is None else None), []
        elif fence is not None:
            found.append((number, line))
        elif line.startswith("    ") and (found or not previous.strip()):
            found.append((number, line[4:]))
        elif found and line.strip():
            yield True, found
            found = []
        previous = line
    if found:
        yield True, found


def words_of(text: str) -> str:
    """A line without the variables that it sets."""
    text = text.replace("\\\n", " ")
    while match := ASSIGNMENT.match(text):
        text = text[match.end() :]
    return text


def commands() -> list[Command]:
    """Raises AssertionError for a line of a block that is neither a command nor known text."""
    found = []
    for page in PAGES:
        for indented, lines in blocks(page):
            start, text = 0, ""
            for number, line in lines:
                start, text = (start, f"{text}\n{line}") if text else (number, line)
                if line.endswith("\\"):
                    continue
                whole, text = text.strip(), ""
                if not whole or whole.startswith("#"):
                    continue
                first = words_of(whole)
                if STARTS.match(first) or first.startswith("--tsft-"):
                    found.append(Command(page.name, start, whole))
                else:
                    assert indented and whole.startswith(TEXT), (
                        f"{page.name}:{start}: '{whole}' is neither a command that is known here"
                        " nor known text: name it in STARTS or in TEXT"
                    )
    return found


COMMANDS = commands()
PROGRAMS = [
    *sorted(
        str(path.relative_to(REPOSITORY))
        for room in ("tools", "benchmarks", "dev")
        for path in REPOSITORY.glob(f"{room}/*.py")
    ),
    "launch/pretrain_gpt_tsft.sh",
    TRAINS,
]


def kept(text: str) -> bool:
    return any(part in text for part in NOT_RUN)


# ---- where they run ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The socket of a server that has imported everything."""
    with tempfile.TemporaryDirectory(prefix="tsft") as folder:  # a socket's path must be short
        address = f"{folder}/socket"
        environment = os.environ | {
            "PYTHONPATH": str(REPOSITORY),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "TRITON_INTERPRET": "1",
        }
        process = subprocess.Popen(
            [sys.executable, str(Path(command_server.__file__)), address],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        try:
            yield address
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # and the forks that a timeout left
            process.wait()
            process.stdout.close()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, server: str) -> Path:
    """A copy of the tracked files, with the modes that are committed and a .venv that is active
    once it is sourced; its `python` asks the server."""
    root = tmp_path_factory.mktemp("documented") / "repository"
    listed = subprocess.run(
        ["git", "ls-files", "--stage", "-z"], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert listed.returncode == 0, listed.stderr
    for entry in filter(None, listed.stdout.split("\0")):
        facts, name = entry.split("\t")
        if (REPOSITORY / name).is_file():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(REPOSITORY / name, root / name)
            (root / name).chmod(0o755 if facts.startswith("100755") else 0o644)
    programs = root / ".venv" / "bin"
    programs.mkdir(parents=True)
    activate = Path(sys.prefix, "bin", "activate").read_text()
    (homes,) = {text.strip("\"'") for text in re.findall(r"VIRTUAL_ENV=(\S*/\S*)", activate)}
    (programs / "activate").write_text(activate.replace(homes, str(root / ".venv")))
    for name in ("python", "python3", "torchrun"):
        text = command_server.CLIENT.format(
            python=sys.executable, server=command_server.__file__, socket=server
        )
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    return root


def start(root: Path, text: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """A line in bash at the root, after the line that README.md begins with."""
    environment = {
        "PATH": "/usr/bin:/bin",
        "HOME": str(root),
        "PYTHONPATH": str(root),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "TRITON_INTERPRET": "1",
        "MAKEFLAGS": "n",  # make prints what it would do
        command_server.TRAINING: "--tsft-check",
        command_server.SCRIPTS: json.dumps(SMALLER),
    }
    return subprocess.run(
        ["bash", "-c", f"set -e\nsource .venv/bin/activate\n{text}"],
        cwd=root,
        env=environment | LAUNCHER | variables,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )


def check(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0, f"{done.stdout[-1500:]}\n{done.stderr[-2500:]}"


@pytest.fixture(scope="module")
def originals(root: Path) -> Path:
    """What STAND_INS point to: a random Llama of eight heads with places for long packs, made into
    everything that a page may name."""
    folder = root.parent / "originals"
    folder.mkdir()
    shape: dict[str, Any] = {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 8}
    shape |= {"vocab_size": 1024, "max_position_embeddings": 8192}
    make_hf(folder / "hf", **shape)
    make_hf(folder / "student", **shape, num_hidden_layers=2)
    write_rows(folder / "chats.jsonl", 40, 0)
    plugin = (REPOSITORY / "examples/plugins/power_target.py").read_text()
    plugin = plugin.replace('"power-target"', '"mine"').replace("= 0.3", "= 0.0")  # no teacher
    (folder / "my_objective.py").write_text(plugin)
    at = shlex.quote(str(folder))
    for line in (
        f"prepare_data.py --input {at}/chats.jsonl --tokenizer {at}/hf --output {at}/data",
        f"convert_checkpoint.py import --hf {at}/hf --megatron {at}/base",
        f"cache_teacher.py --teacher {at}/hf --data {at}/data --output {at}/cache --top-k 8",
    ):
        check(start(root, f"python tools/{line}"))
    shutil.copytree(folder / "data", folder / "more")  # a mixture names no folder twice
    return folder


def written(text: str) -> set[str]:
    """The names that a command makes: they must not be there before."""
    words = shlex.split(text, comments=True)
    flags = {"--output"}
    flags |= {"--megatron"} if "import" in words else set()
    flags |= {"--hf"} if "export" in words else set()
    found = {b for a, b in zip(words, words[1:], strict=False) if a in flags}
    return found | ({"runs/a"} if "export" not in words else set())


@contextlib.contextmanager
def stand_ins(root: Path, originals: Path, text: str) -> Iterator[None]:
    """The root has every stand-in meanwhile, but those that this command makes."""
    makes, made = written(text), []
    for name, original in STAND_INS.items():
        if name not in makes:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).symlink_to(originals / original)
            made.append(root / name)
    yield
    for path in made:
        path.unlink()
    for name in {*makes, "runs"}:
        if (
            not subprocess.run(
                ["git", "ls-files", "--error-unmatch", name], cwd=REPOSITORY, capture_output=True
            ).returncode
            == 0
        ):
            shutil.rmtree(root / name, ignore_errors=True)


# ---- the tests -----------------------------------------------------------------------------------


def run(root: Path, originals: Path, text: str) -> None:
    """One command, as it stands; fails where its exit status is not what the page promises."""
    variables = {}
    if text.startswith("--tsft-"):  # a page shows flags alone
        text = f"{ENTRY} {text}"
    if TRAINS in text:
        variables[command_server.TRAINING] = SMALL_RUN
    if "PRESET=" in text:  # for GPUs
        variables |= {"DRY_RUN": "1", "DEVICE": "cuda", "GPUS_PER_NODE": "8"}
    for benchmark in SMALLER:
        if benchmark in text:
            if benchmark in RAN:
                variables[command_server.PARSES] = "1"
            RAN.add(benchmark)
    if "pytest" in text:
        variables["PYTEST_ADDOPTS"] = "--collect-only -q"
    with stand_ins(root, originals, text):
        done = start(root, text, **variables)
    for part, says in REFUSED.items():
        if part in text:
            assert done.returncode == 2 and says in done.stderr.splitlines()[-1], done.stderr
            return
    check(done)


def marked(command: Command) -> object:
    slow = any(part in command.text for part in SLOW)
    return pytest.param(command, id=str(command), marks=[pytest.mark.slow] if slow else [])


@pytest.mark.parametrize("command", [marked(c) for c in COMMANDS if not kept(c.text)])
def test_it_runs_as_it_stands(command: Command, root: Path, originals: Path) -> None:
    run(root, originals, command.text)


def examples(text: str) -> list[str]:
    """The commands of a help text: what is indented below its line "example" or "examples"."""
    below = re.split(r"^examples?:?\n", text, flags=re.M)[-1].split("\n\n")[0]
    joined = below.replace("\\\n", " ").splitlines()
    found = [line.strip() for line in joined]
    for line in found:
        assert STARTS.match(words_of(line)) or kept(line), f"'{line}' is no command"
    return found


@functools.cache
def help_of(root: Path, script: str, *command: str) -> str:
    done = start(root, shlex.join([script, *command, "--help"]))
    check(done)
    return done.stdout


def test_named_tools_and_their_flags_exist(root: Path) -> None:
    commands = [
        " ".join(block.replace("\\\n", " ").split())
        for page in PAGES
        for block in re.findall(
            r"(?<!tests/)\b((?:tools|benchmarks|dev)/\w+\.py(?:[^\n`]|\\\n)*)",
            page.read_text(encoding="utf-8"),
        )
    ]
    assert len(commands) > 5
    for command in commands:
        tool, *words = command.split()
        assert (REPOSITORY / tool).exists(), command
        sub = [word for word in words[:1] if word in ("import", "export", "verify")]
        for flag in re.findall(r"(?<!\S)--[a-z-]+", command):
            assert flag in help_of(root, tool, *sub), f"{command}: there is no {flag}"


@pytest.mark.parametrize(
    "script",
    [
        pytest.param(name, id=name, marks=[pytest.mark.slow] if name in SLOW else [])
        for name in PROGRAMS
    ],
)
def test_the_examples_of_help_run_as_they_stand(script: str, root: Path, originals: Path) -> None:
    text = help_of(root, script)
    assert script in text
    shown = examples(text)
    assert shown
    for text in shown:
        if not kept(text):
            run(root, originals, text)


def test_what_is_listed_is_still_on_a_page() -> None:
    texts = [command.text for command in COMMANDS]
    rooms = sorted(REPOSITORY.glob("megatron_tsft/commands/*.py"))  # what the doors in tools/ show
    for path in (*(REPOSITORY / name for name in PROGRAMS), *rooms):
        texts.append(path.read_text(encoding="utf-8"))
    for part in (*NOT_RUN, *REFUSED, TRAINS, *SMALLER):
        assert any(part in text for text in texts), f"no page shows {part}: delete its entry"
    words = set(re.split(r"[\s=:\"]+", " ".join(texts)))
    unused = [name for name in STAND_INS if name not in words]
    assert not unused, f"no page names {unused}"


def test_the_commands_are_found() -> None:
    assert len(COMMANDS) > 40
    assert any(command.text == "source .venv/bin/activate" for command in COMMANDS)
    assert any("\n" in command.text for command in COMMANDS)  # one of several lines


def test_a_script_that_cannot_be_executed_is_caught(root: Path) -> None:
    script = root / "dev" / "write_docs.py"
    script.chmod(0o644)
    done = start(root, "dev/write_docs.py --check")
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    assert done.returncode == 126 and "Permission denied" in done.stderr
