"""Every implementation that is timed: what it is called, why it cannot run here, and one forward
and backward of it.

A builder takes a `Case` and returns a step: a function that computes the per-token loss and returns
the gradients of the case's leaves for its upstream gradient. Builders marked "GPU" follow the
package's documented interface; they have not been run on a GPU.
"""

import importlib.util
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_tsft.loss import TeacherTopK
from shared.inputs import CHOICES, Case

Step = Callable[[], tuple[Tensor, ...]]
SFT, DENSE = ("sft",), ("target-sft-dense",)


@dataclass(frozen=True)
class Peer:
    """An implementation. The flags say what the measurement has to know."""

    name: str
    part: str  # logits, or head where it starts from hidden states and the weight
    build: Callable[[Case], Step]
    keys: tuple[str, ...] = tuple(CHOICES)
    module: str = ""  # what must be importable,
    package: str = ""  # and the package that brings it
    needs_gpu: bool = False
    sharded: bool = False  # knows tensor-parallel groups
    destroys: bool = (
        False  # writes over the logits: gets a fresh copy each time, which is not timed
    )
    compiles: bool = False  # in its first call
    per_token: bool = True  # False: only a sum over the tokens, so the upstream gradient is one
    missing: Callable[[], str | None] = lambda: None

    def why_not(self, device: str, world: int) -> str | None:
        """Why it cannot run on this device with this many shards, in a few words; None where it
        can."""
        if self.module and importlib.util.find_spec(self.module) is None:
            return f"not installed (pip install {self.package})"
        if self.needs_gpu and device == "cpu":
            return "needs a GPU"
        if world > 1 and not self.sharded:
            return "does not know vocabulary shards"
        return self.missing()


def gradients(loss: Tensor, case: Case) -> tuple[Tensor, ...]:
    """Those of the leaves, for the upstream gradient of a per-token loss, or of a sum."""
    upstream = case.upstream.to(loss.dtype).reshape(loss.shape) if loss.dim() else None
    return torch.autograd.grad(loss, case.leaves, upstream)


# ---- ours ----------------------------------------------------------------------------------------


def use_backend(name: str | None) -> None:
    """TSFT_BACKEND is read at each call; None is the package's own choice for the device."""
    if name is None:
        os.environ.pop("TSFT_BACKEND", None)
    else:
        os.environ["TSFT_BACKEND"] = name


def our_loss(
    case: Case, logits: Tensor, teacher: Tensor | TeacherTopK | None, inplace: bool = False
) -> Tensor:
    """[N] `q_target_cross_entropy` of this case's objective."""
    from megatron_tsft import q_target_cross_entropy

    objective = CHOICES[case.key].objective()
    return q_target_cross_entropy(
        logits, case.labels, objective, teacher=teacher, tp_group=case.group, inplace=inplace
    ).loss


def ours(backend: str, inplace: bool = False) -> Callable[[Case], Step]:
    def build(case: Case) -> Step:
        def step() -> tuple[Tensor, ...]:
            use_backend(backend)
            return gradients(our_loss(case, case.leaves[0], case.teacher, inplace), case)

        return step

    return build


def head_gradients(loss: Tensor, case: Case) -> tuple[Tensor, ...]:
    """As `gradients`; a matrix product by a shard of the weight gives a part of the hidden states'
    gradient."""
    found = gradients(loss, case)
    if case.group is not None:
        torch.distributed.all_reduce(found[0], group=case.group)
    return found


def matmul_ours(teacher_head: bool) -> Callable[[Case], Step]:
    """The baseline of a fused head: logits as a matrix, then our loss; with `teacher_head` a second
    such product."""

    def build(case: Case) -> Step:
        hidden, weight = case.leaves

        def step() -> tuple[Tensor, ...]:
            use_backend(None)
            teacher = case.teacher
            if teacher_head:
                assert case.teacher_head is not None
                teacher = case.teacher_head[0] @ case.teacher_head[1].T
            return head_gradients(our_loss(case, hidden @ weight.T, teacher), case)

        return step

    return build


def fused_ours(teacher_head: bool) -> Callable[[Case], Step]:
    def build(case: Case) -> Step:
        import megatron_tsft

        hidden, weight = case.leaves
        teacher: Any = case.teacher
        if teacher_head:
            assert case.teacher_head is not None
            teacher = getattr(megatron_tsft, "TeacherHidden")(*case.teacher_head)  # noqa: B009 - not in every version
        fused = getattr(megatron_tsft, "q_target_linear_cross_entropy")  # noqa: B009
        objective = CHOICES[case.key].objective()

        def step() -> tuple[Tensor, ...]:
            use_backend(None)
            out = fused(
                hidden, weight, case.labels, objective, teacher=teacher, tp_group=case.group
            )
            return gradients(out.loss, case)

        return step

    return build


def lacks(*names: str) -> Callable[[], str | None]:
    def missing() -> str | None:
        import megatron_tsft

        absent = [name for name in names if not hasattr(megatron_tsft, name)]
        return f"this megatron_tsft has no {' and no '.join(absent)}" if absent else None

    return missing


# ---- plain torch ---------------------------------------------------------------------------------


def plain_loss(
    key: str, logits: Tensor, labels: Tensor, teacher: Tensor | TeacherTopK | None
) -> Tensor:
    """[N] what one writes by hand: fp32, targets detached, autograd for the rest."""
    log_p = torch.log_softmax(logits.float(), -1)
    nll = -log_p.gather(-1, labels[:, None])[:, 0]
    if key == "sft":
        return nll
    p_y = torch.exp(-nll.detach())
    if key == "dft":
        return p_y * nll
    if key == "gem":
        pi = torch.softmax(logits.detach().float() / CHOICES[key].parameters["beta"], -1)
        return nll + (pi * log_p).sum(-1)
    eta = CHOICES[key].parameters["eta"]
    if teacher is None:
        pi = log_p.detach().exp()
    else:
        dense = (
            _densified(teacher, logits.shape[-1]) if isinstance(teacher, TeacherTopK) else teacher
        )
        pi = torch.softmax(
            (1 - eta) * log_p.detach() + eta * dense.float(), -1
        )  # a constant per token is no matter
    return p_y * nll - (1 - p_y) * (pi * log_p).sum(-1)


def _densified(teacher: TeacherTopK, vocabulary: int) -> Tensor:
    """[N, V] log T: the missing mass spread evenly over the tokens that are not in the top k."""
    others = vocabulary - teacher.ids.shape[-1]
    tail = torch.log1p(-teacher.logprobs.exp().sum(-1, keepdim=True)) - math.log(others)
    return tail.repeat(1, vocabulary).scatter_(-1, teacher.ids, teacher.logprobs)


def plain(compiled: bool = False) -> Callable[[Case], Step]:
    def build(case: Case) -> Step:
        loss = torch.compile(plain_loss, dynamic=False) if compiled else plain_loss
        return lambda: gradients(loss(case.key, case.leaves[0], case.labels, case.teacher), case)

    return build


def torch_cross_entropy(compiled: bool = False) -> Callable[[Case], Step]:
    def build(case: Case) -> Step:
        def loss(logits: Tensor, labels: Tensor) -> Tensor:
            return F.cross_entropy(logits, labels, reduction="none")

        run = torch.compile(loss, dynamic=False) if compiled else loss
        return lambda: gradients(run(case.leaves[0], case.labels), case)

    return build


def matmul_torch(case: Case) -> Step:
    hidden, weight = case.leaves
    return lambda: gradients(
        F.cross_entropy(hidden @ weight.T, case.labels, reduction="none"), case
    )


def torch_linear_cross_entropy(case: Case) -> Step:
    """torch's own fused head, in chunks; it has a chunked path for reduced losses only."""
    hidden, weight = case.leaves
    options = torch.nn.LinearCrossEntropyOptions()
    return lambda: gradients(
        F.linear_cross_entropy(hidden, weight, case.labels, reduction="sum", options=options), case
    )


# ---- other packages ------------------------------------------------------------------------------


def group_of(case: Case) -> Any:
    """The case's group, or one of this process alone, which Megatron needs."""
    if case.group is not None:
        return case.group
    if not torch.distributed.is_initialized():
        backend = "gloo" if case.labels.device.type == "cpu" else "nccl"
        store = torch.distributed.HashStore()  # pyright: ignore[reportPrivateImportUsage]
        torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    return torch.distributed.group.WORLD


def megatron(fused: bool) -> Callable[[Case], Step]:
    def build(case: Case) -> Step:
        group = group_of(case)
        if case.labels.device.type == "cpu":
            from megatron_tsft.cpu import install

            install()  # before Megatron is imported
        from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy
        from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy

        def step() -> tuple[Tensor, ...]:
            if fused:
                loss: Any = fused_vocab_parallel_cross_entropy(case.leaves[0], case.labels, group)
            else:
                loss = vocab_parallel_cross_entropy(case.leaves[0], case.labels, 0.0, group)
            return gradients(loss, case)

        return step

    return build


def transformer_engine(case: Case) -> Step:
    """GPU. [B, S, V] in, by position: the first parameter's name has changed between versions."""
    from transformer_engine.pytorch.cross_entropy import parallel_cross_entropy  # pyright: ignore[reportMissingImports]

    def step() -> tuple[Tensor, ...]:
        loss = parallel_cross_entropy(
            case.leaves[0][None], case.labels[None], 0.0, False, case.group
        )
        return gradients(loss, case)

    return step


def liger(case: Case) -> Step:
    """GPU."""
    from liger_kernel.transformers.functional import liger_cross_entropy  # pyright: ignore[reportMissingImports]

    return lambda: gradients(
        liger_cross_entropy(case.leaves[0], case.labels, reduction="none"), case
    )


def quack(case: Case) -> Step:
    """GPU."""
    from quack.cross_entropy import cross_entropy  # pyright: ignore[reportMissingImports]

    return lambda: gradients(cross_entropy(case.leaves[0], case.labels, reduction="none"), case)


def flash_attention(case: Case) -> Step:
    """GPU."""
    from flash_attn.ops.triton.cross_entropy import cross_entropy_loss  # pyright: ignore[reportMissingImports]

    return lambda: gradients(
        cross_entropy_loss(case.leaves[0], case.labels, process_group=case.group)[0], case
    )


def liger_head(case: Case) -> Step:
    """GPU. A sum: older versions have no per-token upstream gradient."""
    from liger_kernel.transformers.functional import (  # pyright: ignore[reportMissingImports]
        liger_fused_linear_cross_entropy,
    )

    hidden, weight = case.leaves
    return lambda: gradients(
        liger_fused_linear_cross_entropy(hidden, weight, case.labels, reduction="sum"), case
    )


def cut_cross_entropy(case: Case) -> Step:
    """On a CPU its torch.compile implementation; its kernel on a GPU."""
    from cut_cross_entropy import linear_cross_entropy  # pyright: ignore[reportMissingImports]

    hidden, weight = case.leaves
    impl = "torch_compile" if hidden.device.type == "cpu" else "cce"
    return lambda: gradients(
        linear_cross_entropy(hidden, weight, case.labels, reduction="none", impl=impl), case
    )


TRITON = {"module": "triton", "package": "triton", "needs_gpu": True}
PEERS = {
    peer.name: peer
    for peer in (
        Peer("ours-torch", "logits", ours("torch"), sharded=True),
        Peer(
            "ours-torch-inplace", "logits", ours("torch", inplace=True), sharded=True, destroys=True
        ),
        Peer("ours-triton", "logits", ours("triton"), sharded=True, **TRITON),
        Peer(
            "ours-triton-inplace",
            "logits",
            ours("triton", inplace=True),
            sharded=True,
            destroys=True,
            **TRITON,
        ),
        Peer("plain-autograd", "logits", plain()),
        Peer(
            "plain-autograd-compiled",
            "logits",
            plain(compiled=True),
            tuple(CHOICES)[1:],
            compiles=True,
        ),
        Peer("F.cross_entropy", "logits", torch_cross_entropy(), SFT),
        Peer(
            "F.cross_entropy-compiled",
            "logits",
            torch_cross_entropy(compiled=True),
            SFT,
            compiles=True,
        ),
        Peer(
            "megatron",
            "logits",
            megatron(False),
            SFT,
            "megatron",
            "megatron-core",
            sharded=True,
            destroys=True,
        ),
        Peer(
            "megatron-fused",
            "logits",
            megatron(True),
            SFT,
            "megatron",
            "megatron-core",
            sharded=True,
            destroys=True,
            compiles=True,
        ),
        Peer(
            "transformer-engine",
            "logits",
            transformer_engine,
            SFT,
            "transformer_engine",
            "transformer-engine[pytorch]",
            needs_gpu=True,
            sharded=True,
            destroys=True,
        ),
        Peer(
            "liger",
            "logits",
            liger,
            SFT,
            "liger_kernel",
            "liger-kernel",
            needs_gpu=True,
            destroys=True,
        ),
        Peer("quack", "logits", quack, SFT, "quack", "quack-kernels", needs_gpu=True),
        Peer(
            "flash-attn",
            "logits",
            flash_attention,
            SFT,
            "flash_attn",
            "flash-attn",
            needs_gpu=True,
            sharded=True,
        ),
        Peer("matmul+ours", "head", matmul_ours(False), sharded=True),
        Peer("matmul+ours+teacher-head", "head", matmul_ours(True), DENSE, sharded=True),
        Peer(
            "ours-fused",
            "head",
            fused_ours(False),
            sharded=True,
            missing=lacks("q_target_linear_cross_entropy"),
        ),
        Peer(
            "ours-fused+teacher-head",
            "head",
            fused_ours(True),
            DENSE,
            sharded=True,
            missing=lacks("q_target_linear_cross_entropy", "TeacherHidden"),
        ),
        Peer("matmul+F.cross_entropy", "head", matmul_torch, SFT),
        Peer(
            "F.linear_cross_entropy",
            "head",
            torch_linear_cross_entropy,
            SFT,
            per_token=False,
            missing=lambda: (
                None
                if hasattr(F, "linear_cross_entropy")
                else "this torch has no linear_cross_entropy"
            ),
        ),
        Peer(
            "liger-head",
            "head",
            liger_head,
            SFT,
            "liger_kernel",
            "liger-kernel",
            needs_gpu=True,
            per_token=False,
        ),
        Peer(
            "cut-cross-entropy",
            "head",
            cut_cross_entropy,
            SFT,
            "cut_cross_entropy",
            "cut-cross-entropy",
            compiles=True,
        ),
    )
}
