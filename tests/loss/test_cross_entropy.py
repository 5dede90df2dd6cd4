"""sft is cross-entropy: torch's on one rank, Megatron's own on two, value and gradient."""

import warnings

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megatron_tsft import objectives, q_target_cross_entropy
from tests.ranks import run_ranks

S, B, V = 6, 3, 22


def batch(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """logits [s, b, V], labels and upstream gradients [s, b]."""
    g = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(S, B, V, generator=g, dtype=torch.float64)
    labels = torch.randint(0, V, (S, B), generator=g)
    return logits.to(dtype), labels, torch.randn(S, B, generator=g, dtype=torch.float64)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
@pytest.mark.parametrize("smoothing", [None, 0.0, 0.1])
@pytest.mark.parametrize("vocab_size", [V, V - 3])
def test_torch(
    dtype: torch.dtype, tolerance: float, smoothing: float | None, vocab_size: int
) -> None:
    logits, labels, upstream = batch(dtype)
    labels = torch.where(labels < vocab_size, labels, -100)
    theirs, ours = (logits.clone().requires_grad_() for _ in range(2))
    sft = (
        objectives.get("sft")
        if smoothing is None
        else objectives.get("label-smoothing", smoothing=smoothing)
    )
    want = F.cross_entropy(
        theirs[..., :vocab_size].reshape(-1, vocab_size),
        labels.reshape(-1),
        reduction="none",
        label_smoothing=smoothing or 0.0,
    ).reshape(S, B)
    got = q_target_cross_entropy(ours, labels, sft, vocab_size=vocab_size).loss
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
    for loss in (want, got):
        loss.backward(upstream.to(dtype))
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=tolerance, atol=tolerance)


DTYPES = [torch.float32, torch.bfloat16]


def both(rank: int) -> list[list[tuple[Tensor, Tensor]]]:
    """Per dtype: (loss, gradient) of Megatron's function and of ours on this rank's half."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Transformer Engine and Apex are not installed
        from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    group = dist.group.WORLD

    def value_and_gradient(megatron: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        logits, labels, upstream = batch(dtype)
        leaf = logits[..., rank * V // 2 : (rank + 1) * V // 2].clone().requires_grad_()
        if megatron:
            loss = vocab_parallel_cross_entropy(
                leaf.clone(), labels, tp_group=group
            )  # it destroys fp32 logits
        else:
            loss = q_target_cross_entropy(leaf, labels, objectives.get("sft"), tp_group=group).loss
        loss.backward(upstream.to(loss.dtype))
        assert leaf.grad is not None
        return loss.detach(), leaf.grad

    return [[value_and_gradient(megatron, dtype) for megatron in (True, False)] for dtype in DTYPES]


def test_megatron_on_two_ranks() -> None:
    for per_dtype in run_ranks(2, both):
        for dtype, ((loss, grad), (our_loss, our_grad)) in zip(DTYPES, per_dtype, strict=True):
            torch.testing.assert_close(our_loss, loss, rtol=2e-6, atol=2e-6)
            near = 2e-6 if dtype == torch.float32 else 2**-8  # each rounds to bf16 once
            torch.testing.assert_close(our_grad, grad, rtol=near, atol=2e-6)
