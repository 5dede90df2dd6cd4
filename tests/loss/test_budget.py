"""What the loss may cost: collectives, what is kept for backward, and not one wait of the host for
the device."""

import contextlib
import gc
import mmap
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_tsft import TeacherTopK, objectives, q_target_cross_entropy
from megatron_tsft.loss import token_chunks
from tests.loss.cases import (
    NEEDS_TEACHER,
    NUMBERS,
    Case,
    call,
    implementation,
    random_case,
    shard_of,
)
from tests.loss.published import NAMES
from tests.ranks import run_ranks

WIDTH, VOCABULARY = 24, 21
# collectives.py
GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
COLLECTIVES = [
    name
    for name in dir(dist)
    if name.startswith(
        (
            "all_",
            "reduce",
            "broadcast",
            "gather",
            "scatter",
            "send",
            "recv",
            "isend",
            "irecv",
            "barrier",
        )
    )
    and callable(getattr(dist, name))
]


def cases(dtype: torch.dtype = torch.float32) -> dict[str, Case]:
    made = {
        f"{name}-{variant}": random_case(
            name, 3, width=WIDTH, vocab_size=VOCABULARY, dtype=dtype, variant=variant
        )
        for name in NAMES
        for variant in ("plain", "rich")
    }
    for name in NEEDS_TEACHER:
        plain = made[f"{name}-plain"]
        ids = torch.arange(4).expand(*plain.labels.shape, 4)
        made[f"{name}-top-k"] = replace(
            plain, teacher=TeacherTopK(ids, torch.full(ids.shape, 0.2).log())
        )
    return {key: replace(case, diagnostics=("entropy", "kl")) for key, case in made.items()}


# ---- collectives ---------------------------------------------------------------------------------


def count_collectives(rank: int) -> dict[str, tuple[Counter, Counter]]:
    """Per case: what was called forward and backward, in a group of two that is both TP and (for
    iw-sft) CP."""
    group, calls = dist.group.WORLD, Counter()
    out = {}
    with pytest.MonkeyPatch.context() as patch:
        for name in COLLECTIVES:
            patch.setattr(dist, name, counting(getattr(dist, name), name, calls))
        for name, case in cases().items():
            leaf = shard_of(case.logits, rank, 2).requires_grad_()
            loss = call(case, leaf * 1, rank, 2, group, cp_group=group).loss
            forward = calls.copy()
            loss.backward(case.upstream.float())
            out[name] = (forward, calls - forward)
            calls.clear()
    return out


def counting(function: Callable[..., Any], name: str, calls: Counter) -> Callable[..., Any]:
    def counted(*args: Any, **keywords: Any) -> Any:
        calls[name] += 1
        return function(*args, **keywords)

    return counted


def test_collectives() -> None:
    for per_case in run_ranks(2, count_collectives):
        for name, (forward, backward) in per_case.items():
            extra = {"iw-sft": {"all_reduce": 1}}
            allowed = Counter({GATHER: 1}) + Counter(extra.get(cases()[name].members[0][0], {}))
            assert forward == allowed, f"{name} forward: {forward}"
            assert not backward, f"{name} backward: {backward}"


def test_the_counter_sees_collectives() -> None:
    assert {"all_reduce", "all_gather", GATHER, "broadcast"} <= set(COLLECTIVES)


def test_only_what_is_asked_for_is_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers a token: the three of cross-entropy (m, s and the label's logit), then what an
    objective adds."""
    moved: list[int] = []
    monkeypatch.setattr(dist, GATHER, lambda out, x, **keywords: moved.append(len(x)))
    for name, numbers in {
        "sft": [3],
        "dft": [3],
        "idft": [4],
        "deft": [4],
        "gem": [6],
        "eaft": [8],
    }.items():
        moved.clear()
        case = random_case(
            name, 3, width=WIDTH, vocab_size=VOCABULARY, dtype=torch.float32, variant="plain"
        )
        call(case, shard_of(case.logits, 1, 2), 1, 2, Alone())  # type: ignore[arg-type]
        assert moved == numbers, name


# ---- memory --------------------------------------------------------------------------------------


def tensors_in(thing: Any) -> list[Tensor]:
    """Every tensor that an object holds, through dataclasses and containers."""
    if isinstance(thing, Tensor):
        return [thing]
    if is_dataclass(thing):
        return [t for f in fields(thing) for t in tensors_in(getattr(thing, f.name))]
    if isinstance(thing, (list, tuple)):
        return [t for item in thing for t in tensors_in(item)]
    return []


@pytest.mark.parametrize("name", cases(torch.bfloat16))
def test_nothing_vocabulary_sized_is_made_for_backward(name: str) -> None:
    """Kept are the logits and the teacher themselves, a record of k a token, and a few numbers a
    token."""
    case = replace(cases(torch.bfloat16)[name], strided=False)
    leaf = shard_of(case.logits, 0, 1).requires_grad_()
    logits = leaf * 1
    saved: list[Tensor] = []

    def pack(x: Tensor) -> Tensor:
        saved.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = call(case, logits).loss
    assert loss.grad_fn is not None
    node = loss.grad_fn.next_functions[0][0]  # under the view that restores the labels' shape
    attributes = [value for key, value in vars(node).items() if key != "saved_tensors"]
    kept = saved + [t for value in attributes for t in tensors_in(value)]
    tokens, k = case.labels.numel(), 4
    large = [t for t in kept if t.numel() > tokens * k and t.data_ptr() != logits.data_ptr()]
    if isinstance(case.teacher, Tensor):
        assert (
            all(t.dtype == torch.bfloat16 and t.shape == (tokens, WIDTH) for t in large)
            and len(large) <= 1
        )
    else:
        assert not large
    assert any(t.data_ptr() == logits.data_ptr() for t in saved), (
        "the logits are kept by reference, through autograd"
    )
    loss.backward(case.upstream.float())


def test_logits_are_freed_after_backward_though_the_loss_lives() -> None:
    case = cases()["target-sft-plain"]
    leaf = shard_of(case.logits, 0, 1).requires_grad_()
    logits = leaf * 1
    gone = weakref.ref(logits.untyped_storage())
    out = call(case, logits)
    del logits
    gc.collect()
    assert gone() is not None
    out.loss.sum().backward()
    gc.collect()
    assert gone() is None


def test_overwritten_logits_are_noticed() -> None:
    case = cases()["sft-plain"]
    logits = shard_of(case.logits, 0, 1).requires_grad_() * 1
    out = call(case, logits)
    logits.detach().zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.loss.sum().backward()


@pytest.mark.parametrize("path", ["torch", "triton"])
def test_a_gradient_over_the_logits_is_noticed(path: str) -> None:
    """Whoever saved the logits, a second backward among them, gets an error and no wrong number."""
    case = cases()["gem-plain"]
    with implementation(path):
        logits = shard_of(case.logits, 0, 1).requires_grad_() * 1
        out = call(case, logits, inplace=True)
        out.loss.sum().backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.loss.sum().backward()


def test_a_large_gradient_is_mapped_in_huge_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """And is made all the same by a kernel that has none."""

    class Memory(mmap.mmap):
        def madvise(self, *arguments: int) -> None:
            advice.append(arguments)
            raise OSError(22, "Invalid argument")

    advice: list[tuple[int, ...]] = []
    monkeypatch.setattr(token_chunks, "HUGE", 1024)
    logits = torch.randn(9, 64).requires_grad_()
    for memory in (mmap.mmap, Memory):
        monkeypatch.setattr(mmap, "mmap", memory)
        (grad,) = torch.autograd.grad(
            q_target_cross_entropy(logits, torch.arange(9), objectives.get("sft")).loss.sum(),
            logits,
        )
        want = torch.softmax(logits.detach(), -1) - torch.nn.functional.one_hot(torch.arange(9), 64)
        torch.testing.assert_close(grad, want)
    assert advice == [(mmap.MADV_HUGEPAGE,)]


@pytest.mark.parametrize("inplace", [False, True])
def test_the_gradient_buffer(inplace: bool) -> None:
    """Fresh by default; with inplace=True it is the logits' own memory."""
    case = cases()["target-sft-plain"]
    logits = (shard_of(case.logits, 0, 1).requires_grad_() * 1).reshape(-1, WIDTH)
    before, grads = logits.detach().clone(), []
    logits.register_hook(grads.append)
    flat = replace(case, labels=case.labels.reshape(-1), teacher=case.teacher.reshape(-1, WIDTH))  # type: ignore[union-attr]
    call(flat, logits, inplace=inplace).loss.sum().backward()
    assert (grads[0].data_ptr() == logits.data_ptr()) == inplace
    assert inplace or torch.equal(logits.detach().nan_to_num(), before.nan_to_num())


def test_the_callers_tensors_are_left_alone() -> None:
    for name, case in cases().items():
        given = [t for t in tensors_in(case) if t is not case.logits]
        before = [t.clone() for t in given]
        call(case, shard_of(case.logits, 0, 1).requires_grad_()).loss.sum().backward()
        for t, old in zip(given, before, strict=True):
            assert torch.equal(t.nan_to_num(-7), old.nan_to_num(-7)), name


# ---- the host ------------------------------------------------------------------------------------

READS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero")
COPIES = ("_to_copy", "copy_")
FACTORIES = (torch.tensor, torch.as_tensor, torch.asarray)


def device_types(*values: Any) -> set[str]:
    return {value.device.type for value in values if isinstance(value, Tensor)}


class NoHostReads(TorchDispatchMode):
    """Raises where an operation hands a device's numbers to the host, or copies between the two."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name, devices = func.overloadpacket.__name__, device_types(*args, out)
        if "meta" in devices and (name in READS or (name in COPIES and "cpu" in devices)):
            raise AssertionError(f"{func} makes the host wait for the device: {args}")
        return out


class NoUploads(TorchFunctionMode):
    """Raises where torch.tensor and its like make a tensor on the device from numbers of the host,
    which is a copy."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in FACTORIES and "meta" in device_types(out) and "meta" not in device_types(*args):
            raise AssertionError(
                f"{func.__name__}{args} is copied to the device, and the host waits"
            )
        return out


@contextlib.contextmanager
def no_waiting() -> Iterator[None]:
    """The meta device stands for a GPU: it has no data, so whatever needs them fails, and the modes
    see the rest."""
    with NoHostReads(), NoUploads():
        yield


class Alone:
    """A group of two whose collectives do nothing: there is nothing to move on the meta device."""

    def size(self) -> int:
        return 2

    def rank(self) -> int:
        return 1


def on_meta(thing: Any, dtype: torch.dtype | None = None) -> Any:
    if isinstance(thing, Tensor):
        return thing.to("meta")
    if isinstance(thing, TeacherTopK):
        return TeacherTopK(**{f.name: on_meta(getattr(thing, f.name)) for f in fields(thing)})
    return thing


def without_moving(patch: pytest.MonkeyPatch) -> None:
    for name in ("all_reduce", GATHER):
        patch.setattr(dist, name, lambda *args, **keywords: None)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("name", cases())
def test_no_host_synchronisation(name: str, world: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward, with numbers, 0-dim and per-token tensors as parameters: fit for a CUDA
    graph."""
    without_moving(monkeypatch)
    case = cases()[name]
    members = [
        (n, {key: on_meta(value) for key, value in given.items()}) for n, given in case.members
    ]
    moved = {f.name: on_meta(getattr(case, f.name)) for f in fields(case)}
    case = replace(case, **moved | {"members": members})
    group: Any = Alone() if world == 2 else None
    leaf = shard_of(case.logits, world - 1, world).requires_grad_()
    with no_waiting():
        out = call(case, leaf * 1, world - 1, world, group, cp_group=group)
        out.loss.backward(case.upstream.float())
    assert leaf.grad is not None and leaf.grad.shape == leaf.shape


@pytest.mark.parametrize("name", NUMBERS)
def test_no_host_synchronisation_with_scheduled_parameters(name: str) -> None:
    """Parameters in 0-dim device tensors, which a schedule updates in place."""
    case = cases()[f"{name}-plain"]
    given = case.members[0][1]
    members = [
        (name, {k: v if k == "top_k" else torch.tensor(v).to("meta") for k, v in given.items()})
    ]
    case = replace(
        case,
        **{f.name: on_meta(getattr(case, f.name)) for f in fields(case)} | {"members": members},
    )
    leaf = shard_of(case.logits, 0, 1).requires_grad_()
    with no_waiting():
        call(case, leaf * 1).loss.backward(case.upstream.float())


def test_no_host_synchronisation_in_a_mixture() -> None:
    shape = (18, 2)
    members = [objectives.get(name) for name in NAMES]
    index = torch.arange(36).reshape(shape) % len(members)
    mixed = objectives.mixture(members, index.to("meta"))
    tokens, labels = (
        torch.zeros(shape, device="meta"),
        torch.zeros(shape, dtype=torch.int64, device="meta"),
    )
    logits = torch.zeros(*shape, WIDTH, device="meta").requires_grad_()
    with no_waiting():
        out = q_target_cross_entropy(
            logits * 1,
            labels,
            mixed,
            teacher=logits.detach(),
            reference_logprobs=tokens,
            token_weights=tokens,
            sequence_ids=labels,
            num_sequences=3,
            diagnostics=("entropy", "kl"),
        )
        out.loss.backward(tokens)


def test_the_modes_notice_a_wait() -> None:
    x, weight = torch.zeros(3, device="meta"), torch.tensor(0.5)
    for waits in (
        lambda: x + torch.ones(3).to("meta"),
        lambda: x[x > 0],
        lambda: float(x[0]),
        lambda: torch.tensor(0.5, device="meta"),
        lambda: torch.as_tensor(0.5, device="meta"),
        lambda: torch.as_tensor(weight, device="meta"),
    ):
        with no_waiting(), pytest.raises((AssertionError, RuntimeError, NotImplementedError)):
            waits()
    with no_waiting():  # a number of the host travels with the kernel's arguments
        _ = x + 0.5 + weight + torch.full((), 0.5, device="meta")
