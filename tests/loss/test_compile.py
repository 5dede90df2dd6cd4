"""torch.compile around the losses: it breaks its graph there, once, and gives what eager code
gives."""

import os
import tempfile
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megatron_tsft import (
    TeacherHidden,
    TeacherTopK,
    objectives,
    q_target_cross_entropy,
    q_target_linear_cross_entropy,
)
from tests.fresh import fresh
from tests.loss.cases import PATHS, implementation

SHAPE, WIDTH, SIZE = (5, 3), 20, 6
# torch asks for .grad of what enters the graph after a break, whatever function it broke at
pytestmark = pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)


class Model(nn.Module):
    """Embedding, linear layer, head and loss, in one forward that is compiled."""

    def __init__(self, fused: bool):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.linear, self.fused = (
            nn.Embedding(WIDTH, SIZE),
            nn.Linear(SIZE, SIZE),
            fused,
        )
        self.head = nn.Parameter(torch.randn(WIDTH, SIZE))

    def forward(
        self, tokens: Tensor, labels: Tensor, objective: objectives.Objective, **given: Any
    ) -> Tensor:
        hidden = torch.tanh(self.linear(self.embedding(tokens)))
        if self.fused:
            out = q_target_linear_cross_entropy(hidden, self.head, labels, objective, **given)
        else:
            out = q_target_cross_entropy(hidden @ self.head.T, labels, objective, **given)
        return (out.loss * out.imitation.clamp(min=0.1)).mean()  # a graph after the loss


def problems(fused: bool) -> list[tuple[str, dict[str, Any]]]:
    """Objectives, and what else the loss is given."""
    g = torch.Generator().manual_seed(1)
    top = TeacherTopK(torch.arange(4).expand(*SHAPE, 4), torch.full((*SHAPE, 4), 0.2).log())
    hidden = TeacherHidden(torch.randn(*SHAPE, 4, generator=g), torch.randn(WIDTH, 4, generator=g))
    return [
        ("eaft", {"diagnostics": ("entropy", "kl"), "logit_scale": 0.5}),
        ("kd", {"teacher": top}),
        ("target-sft", {"teacher": hidden if fused else hidden.hidden @ hidden.weight.T}),
    ]


def step(model: nn.Module, forward: Any, name: str, given: dict[str, Any]) -> list[Tensor]:
    """The loss and every parameter's gradient."""
    g = torch.Generator().manual_seed(2)
    tokens, labels = (torch.randint(WIDTH, SHAPE, generator=g) for _ in range(2))
    labels[0] = -100
    model.zero_grad()
    loss = forward(tokens, labels, objectives.get(name), **given)
    loss.backward()
    return [loss.detach()] + [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("path", PATHS)
def test_compiled(path: str) -> None:
    """One graph before the loss and one after, nothing of the loss between them, and not a bit is
    different."""
    model, graphs = Model(path == "fused"), []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    for name, given in problems(path == "fused"):
        torch.compiler.reset()
        graphs.clear()
        with implementation(path):
            want = step(model, model, name, given)
            got = step(model, torch.compile(model, backend=backend), name, given)
        assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))
        assert len(graphs) == 2, f"{name}: {graphs}"


def compile_for_real() -> None:
    """With inductor, for a fresh interpreter; what surrounds the loss may be rounded otherwise."""
    with tempfile.TemporaryDirectory() as scratch:
        os.environ |= {"TORCHINDUCTOR_CACHE_DIR": scratch, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        for model in map(Model, (False, True)):
            compiled = torch.compile(model)
            # the plain head's two cheaper problems, the fused head's with a teacher's hidden states
            for problem in problems(model.fused)[2:] if model.fused else problems(False)[:2]:
                for got, want in zip(
                    step(model, compiled, *problem), step(model, model, *problem), strict=True
                ):
                    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_inductor() -> None:
    fresh(compile_for_real)
