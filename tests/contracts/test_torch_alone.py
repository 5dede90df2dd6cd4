"""`pip install .` without extras is enough for the objectives and the losses: torch alone."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]

# what distributions are imported as, where that is another name
MODULES = {"megatron-core": "megatron"}
PROGRAM = """
import sys

blocked = set(sys.argv[1:])


class Nothing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in blocked:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, Nothing())

import torch

from megatron_tsft import (
    TeacherHidden,
    TeacherTopK,
    objectives,
    q_target_cross_entropy,
    q_target_linear_cross_entropy,
)

torch.manual_seed(0)
hidden, weight = torch.randn(6, 4, requires_grad=True), torch.randn(11, 4, requires_grad=True)
labels, teacher = torch.arange(6), torch.log_softmax(torch.randn(6, 11), -1)
objective, top = objectives.get("target-sft"), teacher.topk(3)
losses = {
    "logits": q_target_cross_entropy(hidden @ weight.T, labels, objective, teacher),
    "top-k": q_target_cross_entropy(
        hidden @ weight.T, labels, objective, TeacherTopK(top.indices, top.values)
    ),
    "head": q_target_linear_cross_entropy(
        hidden, weight, labels, objective, TeacherHidden(torch.randn(6, 5), torch.randn(11, 5))
    ),
}
for name, out in losses.items():
    hidden.grad = weight.grad = None
    out.loss.sum().backward()
    assert hidden.grad.isfinite().all() and hidden.grad.abs().sum() > 0, name
    assert weight.grad.isfinite().all() and weight.grad.abs().sum() > 0, name
print("blocked and imported:", sorted(blocked & {name.split(".")[0] for name in sys.modules}))
"""


def required(extra: str | None) -> list[str]:
    """Names of the distributions that the package, or one of its extras, asks for."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = project["dependencies"] if extra is None else project["optional-dependencies"][extra]
    return [re.split(r"[<>=\[ ]", requirement)[0] for requirement in wanted]


def test_the_losses_need_torch_alone() -> None:
    assert required(None) == ["torch"]
    blocked = [MODULES.get(name, name) for name in required("train")] + ["triton"]
    assert {"megatron", "numpy", "transformers"} <= set(blocked)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *blocked], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "blocked and imported: []"
