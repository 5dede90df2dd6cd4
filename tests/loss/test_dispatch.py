"""Who reads the vocabulary: what TSFT_BACKEND and the logits choose, what is refused, and a machine
without Triton."""

import importlib
import sys
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_tsft import objectives, q_target_cross_entropy, q_target_linear_cross_entropy
from megatron_tsft.loss import dispatch
from tests.fresh import fresh


@pytest.fixture(scope="module", autouse=True)
def kernels_for_this_machine() -> None:
    """Imported before a test takes TRITON_INTERPRET away: triton.jit reads it once, for every test
    of the process."""
    importlib.import_module("megatron_tsft.loss.triton.launch")


def chosen(
    backend: str | None, interpret: str | None, device: str, dtype: torch.dtype = torch.float32
) -> str:
    """The implementation's name for such logits, or why there is none."""
    with (
        pytest.MonkeyPatch.context() as patch,
        FakeTensorMode(),
    ):  # "cuda" without a GPU: only device and type are asked
        for name, value in (("TSFT_BACKEND", backend), ("TRITON_INTERPRET", interpret)):
            patch.delenv(name, raising=False) if value is None else patch.setenv(name, value)
        try:
            return dispatch.implementation(torch.empty(2, 3, device=device, dtype=dtype)).__name__
        except ValueError as error:
            return str(error)


TORCH, TRITON = "megatron_tsft.loss.token_chunks", "megatron_tsft.loss.triton.launch"
CHOICES = [
    (None, None, "cpu", torch.float32, TORCH),
    (None, "1", "cpu", torch.float32, TORCH),  # the interpreter is for who asks for it
    ("", None, "cpu", torch.bfloat16, TORCH),
    ("torch", None, "cpu", torch.float32, TORCH),
    ("triton", "1", "cpu", torch.bfloat16, TRITON),
    (None, None, "meta", torch.float32, TORCH),
    (None, None, "cuda", torch.float16, TRITON),
    (None, None, "cuda", torch.float64, TORCH),
    ("torch", None, "cuda", torch.bfloat16, TORCH),
    ("triton", None, "cuda", torch.bfloat16, TRITON),
    ("Triton", "1", "cpu", torch.float32, "TSFT_BACKEND='Triton'; valid: torch, triton, or unset"),
    ("cuda", None, "cuda", torch.float32, "TSFT_BACKEND='cuda'; valid: torch, triton, or unset"),
    (
        "triton",
        None,
        "cpu",
        torch.float32,
        "logits are on the CPU; TRITON_INTERPRET=1, set before the start",
    ),
    ("triton", "0", "cpu", torch.float32, "logits are on the CPU"),
    ("triton", "1", "cpu", torch.float64, "logits are float64, the kernels compute in float32"),
    ("triton", None, "cuda", torch.float64, "logits are float64"),
    ("triton", "1", "meta", torch.float32, "logits are on meta"),
]


@pytest.mark.parametrize(("backend", "interpret", "device", "dtype", "expected"), CHOICES)
def test_chosen(
    backend: Any, interpret: Any, device: str, dtype: torch.dtype, expected: str
) -> None:
    got = chosen(backend, interpret, device, dtype)
    assert got == expected if expected in (TORCH, TRITON) else expected in got


def solve() -> list[list]:
    """Losses and gradients of both functions."""
    g = torch.Generator().manual_seed(0)
    hidden, weight = (
        torch.randn(*size, generator=g, requires_grad=True) for size in ((5, 3), (11, 3))
    )
    labels, objective = torch.arange(5), objectives.get("gem")
    losses = [
        q_target_cross_entropy(hidden @ weight.T, labels, objective).loss,
        q_target_linear_cross_entropy(hidden, weight, labels, objective).loss,
    ]
    grads = [x for loss in losses for x in torch.autograd.grad(loss.sum(), (hidden, weight))]
    return [x.tolist() for x in (*losses, *grads)]


def test_the_losses_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TSFT_BACKEND", "fast")
    with pytest.raises(ValueError, match="TSFT_BACKEND='fast'"):
        solve()


def imported() -> list[str]:
    """For a fresh interpreter: heavy modules that importing and using the package imports."""
    solve()
    return [
        name
        for name in ("triton", "torch._dynamo", "megatron.core", "transformers")
        if name in sys.modules
    ]


def without_triton() -> list[Any]:
    """For a fresh interpreter: no finder finds triton, which is what "not installed" means."""

    class Without:
        def __init__(self, finder: Any):
            self.finder = finder

        def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
            return (
                None
                if name.partition(".")[0] == "triton"
                else self.finder.find_spec(name, path, target)
            )

    assert "triton" not in sys.modules
    sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
    return [chosen(None, None, "cuda"), chosen("triton", "1", "cpu"), solve()]


def test_what_is_imported() -> None:
    assert fresh(imported) == []


def test_where_triton_is_not_installed() -> None:
    refusal = "TSFT_BACKEND=triton cannot be used: triton is not installed"
    assert fresh(without_triton) == [TORCH, refusal, solve()]
