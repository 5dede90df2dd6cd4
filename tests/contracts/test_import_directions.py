"""Who may import whom: the rooms of the package form an order, and imports point downwards only
(CONTRIBUTING.md)."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGE = "megatron_tsft"

# a room may import rooms of a smaller number, and itself;
# training and bridge share one, so neither sees the other
ORDER = {
    "commands": 9,
    "training": 8,
    "bridge": 8,
    "model": 7,
    "plan": 6,
    "teacher": 5,
    "data": 4,
    "checkpoint": 3,
    "loss": 2,
    "objectives": 1,
    "upstream": 0,
}
# in this order, and usable by every room but the two that import torch only
BOTTOM = {"names": 0, "errors": 0, "typed": 0, "console": 1, "lock": 1, "plain_json": 1, "trust": 1}
BOTTOM |= {"processes": 0}
BOTTOM |= {"atomic": 2, "cards": 3, "entry": 2, "inside": 2, "pages": 3}
EVERYBODYS = "names"  # of these, what the rooms that import torch only may use
ASKS_TORCH = "entry"  # of these, the one that asks torch whether there is a GPU
WITHOUT_MEGATRON = {"plan", "teacher", "data"}
TORCH_ONLY = {"objectives", "loss"}
KERNELS = (
    "loss/triton"  # may import triton too; loss/dispatch.py imports it when a kernel is wanted
)
BELOW_TRAINING = set(ORDER) - {"training", "commands"}


def room_of(module: str) -> str:
    """'megatron_tsft.loss.api' -> 'loss'; the package itself -> ''."""
    return (module.split(".") + [""])[1]


def imported_modules(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of every import anywhere in a file, also inside functions and by
    importlib.

    `from a import b` gives 'a.b', because b may be a module.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                yield node.lineno, f"{PACKAGE}.relative-import"
            else:
                yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in (
            "importlib.import_module",
            "__import__",
        ):
            literal = node.args[0] if node.args else None
            if isinstance(literal, ast.Constant) and isinstance(literal.value, str):
                yield node.lineno, literal.value


def is_entry_point(tree: ast.Module) -> bool:
    """A file that is run: it ends in `if __name__ == "__main__"`."""
    return any(
        isinstance(node, ast.If) and "__name__" in ast.unparse(node.test) for node in tree.body
    )


def reads_global_args(tree: ast.AST) -> Iterator[int]:
    """Lines that reach for Megatron's global arguments (`typing.get_args` is something else)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "megatron":
            if node.module == "megatron.training.global_vars" or any(
                alias.name in ("get_args", "global_vars") for alias in node.names
            ):
                yield node.lineno
        elif isinstance(node, ast.Import):
            if any(alias.name == "megatron.training.global_vars" for alias in node.names):
                yield node.lineno
        elif (
            isinstance(node, ast.Attribute)
            and node.attr == "get_args"
            and ast.unparse(node.value) != "typing"
        ):
            yield node.lineno


def violations(room: str, tree: ast.Module, kernels: bool = False) -> list[str]:
    """What a file of `room` ('' for the package's own __init__; `kernels`: in KERNELS) imports
    against the rules."""
    found = []
    for line, name in imported_modules(tree):
        top, target = name.split(".")[0], room_of(name)
        if top != PACKAGE:
            allowed = (
                top == "torch" or top in sys.stdlib_module_names or (top == "triton" and kernels)
            )
            if room in TORCH_ONLY | BOTTOM.keys() and not (
                allowed and (top != "torch" or room in TORCH_ONLY | {ASKS_TORCH})
            ):
                found.append(
                    f"{line}: {room} imports {name}, but may import the standard library and torch"
                    " only"
                )
            if room in WITHOUT_MEGATRON and top == "megatron":
                found.append(f"{line}: {room} imports {name}, but knows nothing of Megatron")
        elif target == "relative-import":
            found.append(f"{line}: a relative import hides its room: write {PACKAGE}...")
        elif target == room:
            continue
        elif room in BOTTOM:
            if BOTTOM.get(target, len(BOTTOM)) >= BOTTOM[room]:
                found.append(f"{line}: {room} imports {name}, but lies at the very bottom")
        elif target in BOTTOM:
            if room in TORCH_ONLY and target != EVERYBODYS:
                found.append(f"{line}: {room} imports {name}, but may import torch only")
        elif room in TORCH_ONLY:
            if (room, target) != ("loss", "objectives"):
                found.append(f"{line}: {room} imports {name}, but may import torch only")
        elif target == "cpu":
            if not is_entry_point(tree) and room != "commands":
                found.append(f"{line}: {room} imports {name}: only entry points and tests may")
        elif room == "cpu":
            if target != "upstream":
                found.append(f"{line}: cpu imports {name}, but stands outside the order")
        elif room == "":
            if target not in TORCH_ONLY:
                found.append(
                    f"{line}: the package's __init__ imports {name}, but `import {PACKAGE}` needs"
                    " torch only"
                )
        elif target not in ORDER or ORDER[target] >= ORDER[room]:
            found.append(f"{line}: {room} imports {name}, which does not lie below it")
    if room in BELOW_TRAINING:
        found += [
            f"{line}: {room} reads Megatron's global arguments" for line in reads_global_args(tree)
        ]
    return found


def package_files() -> list[Path]:
    return sorted((REPOSITORY / PACKAGE).rglob("*.py"))


def room_of_file(path: Path) -> str:
    first = path.relative_to(REPOSITORY / PACKAGE).parts[0]
    return "" if first == "__init__.py" else first.removesuffix(".py")


@pytest.mark.parametrize(
    "path", package_files(), ids=lambda path: str(path.relative_to(REPOSITORY))
)
def test_imports_point_downwards(path: Path) -> None:
    room = room_of_file(path)
    assert room in {"", "cpu", *ORDER, *BOTTOM}, (
        f"{room} is a room without a place in the order: give it one here"
    )
    kernels = path.is_relative_to(REPOSITORY / PACKAGE / KERNELS)
    assert violations(room, ast.parse(path.read_text(encoding="utf-8")), kernels) == []


def test_the_package_never_imports_scripts_or_tests() -> None:
    for path in package_files():
        for line, name in imported_modules(ast.parse(path.read_text(encoding="utf-8"))):
            assert name.split(".")[0] not in ("tools", "examples", "launch", "tests"), (
                f"{path}:{line} imports {name}"
            )


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("objectives", "from megatron_tsft.loss import api"),
        ("objectives", "import numpy"),
        ("objectives", "from megatron_tsft.errors import UserError"),
        ("loss", "def f():\n    from megatron.core import parallel_state"),
        ("loss", "from megatron_tsft.upstream import rope_factor"),
        ("loss", "from . import api"),
        ("loss", "import triton"),
        ("checkpoint", "from megatron_tsft.data import chat"),
        ("data", "from megatron_tsft import teacher"),
        ("teacher", "import megatron_tsft.model.output_hook"),
        ("model", "from megatron_tsft.training.run import run"),
        ("plan", "from megatron_tsft.model import output_hook"),
        ("plan", "def f():\n    from megatron.core import parallel_state"),
        ("training", "from megatron_tsft.commands import cache"),
        ("model", "from megatron.training import get_args"),
        ("model", "import megatron.training as mt\nmt.get_args()"),
        ("bridge", "from megatron.training.global_vars import get_timers"),
        ("bridge", "from megatron_tsft.training import run"),
        ("training", "import importlib\nimportlib.import_module('megatron_tsft.bridge')"),
        ("training", "from megatron_tsft.cpu import install"),
        ("upstream", "from megatron_tsft.loss import api"),
        ("cpu", "from megatron_tsft.training import run"),
        ("errors", "import torch"),
        ("atomic", "from megatron_tsft.checkpoint import tokenizer"),
        ("atomic", "from megatron_tsft.cards import load_card"),
        ("", "from megatron_tsft import checkpoint"),
    ],
)
def test_a_wrong_import_is_found(room: str, source: str) -> None:
    assert len(violations(room, ast.parse(source))) == 1


@pytest.mark.parametrize(
    ("room", "source"),
    [
        (
            "loss",
            "from typing import get_args\nimport torch.distributed\nfrom megatron_tsft import"
            " objectives",
        ),
        ("atomic", "import os\nfrom megatron_tsft.errors import UserError"),
        (
            "training",
            "from megatron_tsft.cpu import install\nif __name__ == '__main__':\n    install()",
        ),
        (
            "training",
            "from megatron.training import get_args\nfrom megatron_tsft.model import output_hook",
        ),
        ("cpu", "from megatron_tsft.upstream import dataset_helpers\nimport torch"),
    ],
)
def test_a_right_import_passes(room: str, source: str) -> None:
    assert violations(room, ast.parse(source)) == []


def test_a_plan_is_made_without_megatron() -> None:
    program = (
        "import sys, megatron_tsft.plan.plan\n"
        "print([name for name in sys.modules if name.split('.')[0] == 'megatron'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_the_loss_loads_without_megatron_and_transformers() -> None:
    program = (
        "import sys, megatron_tsft, megatron_tsft.loss, megatron_tsft.objectives\n"
        "loaded = {name.split('.')[0] for name in sys.modules}\n"
        "print(sorted(loaded & {'megatron', 'transformers', 'datasets', 'triton'}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
