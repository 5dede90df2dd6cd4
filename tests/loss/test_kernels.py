"""The Triton kernels: compiled for GPUs that are not here, at the edges of shapes and numbers, and
on a GPU if any."""

import itertools
import os
import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_tsft import TeacherTopK, objectives, q_target_cross_entropy
from megatron_tsft.loss.reference import q_target_reference
from tests.covering import met
from tests.fresh import fresh
from tests.loss.cases import PATHS, Case, check, implementation, random_case, run
from tests.loss.published import NAMES
from tests.loss.test_linear_head import moved
from tests.ranks import run_ranks

# ---- compiled ahead of time ----------------------------------------------------------------------

COMPILED = [
    "sft",
    "idft",
    "deft",
    "gem",
    "target-sft",
    "gift",
    "kd-top-k",
]  # what they differ in: SUMS of statistics.py
COLUMNS = 8192  # two blocks
POINTERS = {torch.bool: "*i1", torch.int64: "*i64", torch.float32: "*fp32", torch.bfloat16: "*bf16"}


def launches(name: str, dtype: torch.dtype) -> list[tuple[Any, dict[str, Any]]]:
    """The kernels and arguments that the loss launches, forward and backward: recorded, not run."""
    from megatron_tsft.loss.triton import launch

    made: list[tuple[Any, dict[str, Any]]] = []

    class Recorder(dict):
        def __init__(self, kernel: Any):
            self.kernel = kernel

        def __missing__(self, grid: Any) -> Callable[..., None]:
            return lambda **arguments: made.append((self.kernel, arguments))

    objective, top_k = objectives.get(name.removesuffix("-top-k")), name.endswith("-top-k")
    logits, labels = (
        torch.zeros(2, COLUMNS, dtype=dtype, requires_grad=True),
        torch.zeros(2, dtype=torch.int64),
    )
    sparse = TeacherTopK(torch.arange(50).expand(2, 50), torch.full((2, 50), 0.01).log())
    teacher = sparse if top_k else None if objective.teacher == "none" else torch.zeros_like(logits)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TSFT_BACKEND", "triton")
        patch.setenv(
            "TRITON_INTERPRET", "1"
        )  # only now, when the kernels are made: it lets CPU tensors reach them
        for kernel in ("forward_kernel", "backward_kernel"):
            patch.setattr(launch, kernel, Recorder(getattr(launch, kernel)))
        q_target_cross_entropy(
            logits, labels, objective, teacher, diagnostics=("kl",)
        ).loss.sum().backward()
    return made


def compiled(kernel: Any, arguments: dict[str, Any], capability: int) -> Any:
    """What triton.jit would compile for these arguments, by its rules: None and 1 are constants, 16
    divides or not."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        value = arguments[name]
        if value is None or name.isupper() or (isinstance(value, int) and value == 1):
            signature[name], constants[(i,)] = "constexpr", value
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = POINTERS[value.dtype] if isinstance(value, Tensor) else "i32"
            if (value.data_ptr() if isinstance(value, Tensor) else value) % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
    options = {key: value for key, value in arguments.items() if key not in kernel.arg_names}
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def compile_all(dtype: str) -> dict[str, tuple[int, int, str]]:
    """128-bit loads and stores in the PTX, and what cuobjdump says the machine code uses. For a
    fresh interpreter."""
    os.environ["TRITON_INTERPRET"], out = "0", {}
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["TRITON_CACHE_DIR"] = scratch
        import triton.backends.nvidia

        cubin, cuobjdump = (
            Path(scratch) / "cubin",
            Path(triton.backends.nvidia.__path__[0]) / "bin" / "cuobjdump",
        )
        for name in COMPILED:
            for kernel, arguments in launches(name, getattr(torch, dtype)):
                for capability in (80, 90):
                    code = compiled(kernel, arguments, capability).asm
                    cubin.write_bytes(code["cubin"])
                    line = [cuobjdump, "--dump-resource-usage", cubin]
                    usage = subprocess.run(line, check=True, capture_output=True, text=True).stdout
                    wide = [
                        len(re.findall(rf"{way}\.global\S*\.v4\.b32", code["ptx"]))
                        for way in ("ld", "st")
                    ]
                    out[f"{kernel.fn.__name__} {name} sm_{capability}"] = (*wide, usage)
    return out


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_compiled_for_gpus(dtype: str) -> None:
    """128 bits a load and a store of all that is as wide as the vocabulary, and nothing spilled to
    memory."""
    results = fresh(compile_all, dtype)
    assert len(results) == 2 * 2 * len(COMPILED)
    words = 16 * getattr(torch, dtype).itemsize // 4  # a thread has 16 columns of a block of 4096
    for what, (loads, stores, usage) in results.items():
        tensors = 2 if "target-sft" in what or "gift" in what else 1
        assert loads >= tensors * words // 4, what
        if "backward" in what:
            assert stores >= 2 * words // 4, what  # the gradient, and an idle token's zeros
        assert "STACK:0 " in usage and "LOCAL:0 " in usage, f"{what} spills: {usage}"


# ---- where numbers and shapes end ----------------------------------------------------------------

numpy_may_warn = pytest.mark.filterwarnings(
    "ignore::RuntimeWarning"
)  # Triton's interpreter is numpy


def solve(
    logits: Tensor, labels: Tensor, name: str = "target-sft", inplace: bool = False, **given: Any
) -> list[Tensor]:
    """Loss and gradient by the kernels, in blocks of 8 columns."""
    leaf = logits.detach().requires_grad_()
    upstream = given.pop("upstream", torch.ones(labels.shape))
    with implementation("triton"):
        loss = q_target_cross_entropy(
            leaf, labels, objectives.get(name), inplace=inplace, **given
        ).loss
        return [loss.detach(), torch.autograd.grad(loss, leaf, upstream)[0]]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def solve_far_apart(rank: int, strides: tuple[int, int]) -> None:
    g = torch.Generator().manual_seed(0)
    near = [torch.randn(3, 13, generator=g).bfloat16() for _ in range(2)]
    far = [
        torch.empty(13 * 2**28, dtype=torch.bfloat16).as_strided((3, 13), strides) for _ in range(2)
    ]
    for there, here in zip(far, near, strict=True):
        there.copy_(here)
    labels = torch.tensor([3, 12, 0])
    want = solve(near[0], labels, teacher=near[1])
    assert equal(solve(far[0], labels, teacher=far[1]), want)
    loss, grad = solve(far[0], labels, teacher=far[1], inplace=True)
    assert equal([loss, grad], want) and grad.data_ptr() == far[0].data_ptr()


@pytest.mark.parametrize("strides", [(2**30, 1), (1, 2**28)], ids=["rows", "columns"])
def test_offsets_beyond_32_bits(strides: tuple[int, int]) -> None:
    """Logits, teacher and gradient lie 2^31 elements apart; the 4 GiB are promised by the system
    and never touched.

    In a process of its own, which a wrong address may end.
    """
    run_ranks(1, solve_far_apart, strides, group=False)


WIDE = ["sft", "deft", "eaft", "gem", "target-sft", "kd"]
WIDTHS = [1, 7, 8, 9, 17]
# with and without padding by turns along both: the interpreter is slow, and each objective and each
# width meets both
PADDED = [
    (name, width, min(3, width - 1) * ((i + j) % 2))
    for i, name in enumerate(WIDE)
    for j, width in enumerate(WIDTHS)
]


@pytest.mark.parametrize(("name", "width", "padding"), PADDED)
def test_widths_around_a_block(name: str, width: int, padding: int) -> None:
    case = random_case(
        name, 7, width=width, vocab_size=width - padding, dtype=torch.float32, variant="rich"
    )
    check(case, run(case, path="triton"))


def test_every_width_is_padded_and_not() -> None:
    rows = [(name, width, padding > 0) for name, width, padding in PADDED if width > 1]
    assert met(rows, 2) == met(itertools.product(WIDE, WIDTHS[1:], (False, True)), 2)


@numpy_may_warn
@pytest.mark.parametrize("name", ["sft", "gem", "target-sft"])
def test_idle_rows(name: str) -> None:
    """Ignored labels and upstream gradients of 0 give exact zeros, whatever lies in their logits
    and teacher."""
    g = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(6, 11, generator=g), torch.tensor([1, -100, 3, -100, 5, 6])
    upstream = torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0, 0.0])
    idle = torch.tensor([False, True, True, True, False, True])
    logits[idle] = torch.nan
    teacher = torch.randn(6, 11, generator=g).masked_fill(labels[:, None] == -100, torch.nan)
    given: dict[str, Any] = {"teacher": teacher} if name == "target-sft" else {}
    loss, grad = solve(logits, labels, name, upstream=upstream, **given)
    assert not grad[idle].any() and grad[~idle].all() and not loss[labels == -100].any()
    ignored = torch.full_like(labels, -100)
    loss, grad = solve(logits, ignored, name, **given)
    assert not loss.any() and not grad.any()


@pytest.mark.parametrize("tail", ["drop", "uniform"])
def test_inputs_that_are_expanded(tail: Any) -> None:
    """One number in memory for all tokens: weights, parameters, a top-k teacher that is the same
    for each."""
    g = torch.Generator().manual_seed(0)
    ids, logprobs = torch.tensor([1, 9]).expand(5, 2), torch.tensor([0.5, 0.2]).log().expand(5, 2)
    case = Case(
        members=[("target-sft", {"eta": torch.tensor(0.3).expand(5)})],
        logits=torch.randn(5, 11, generator=g),
        labels=torch.randint(0, 11, (5,), generator=g),
        upstream=torch.ones(()).expand(5),
        vocab_size=11,
        teacher=TeacherTopK(ids, logprobs, tail),
        token_weights=torch.tensor(0.7).expand(5),
    )
    check(case, run(case, path="triton"))


@numpy_may_warn
@pytest.mark.parametrize("path", ["torch", "triton"])
@pytest.mark.parametrize("name", ["sft", "gem", "label-smoothing", "eaft", "deft", "idft"])
def test_logits_that_are_no_numbers(name: str, path: str) -> None:
    """-inf is a token that cannot be; NaN, +inf and a row of -inf alone are no distribution, so no
    finite loss."""
    logits = torch.randn(5, 19, generator=torch.Generator().manual_seed(0))
    logits[0, 2:], logits[1, 9], logits[2, 18] = (
        -torch.inf,
        torch.nan,
        torch.inf,
    )  # a block of 8 without any number
    logits[3] = -torch.inf
    uniform = (
        name == "label-smoothing"
    )  # its target is on the excluded tokens too: the loss is as good as infinite
    with implementation(path):
        out = q_target_cross_entropy(logits, torch.ones(5, dtype=torch.int64), objectives.get(name))
    assert torch.equal(out.nll.isnan(), torch.tensor([False, True, True, True, False]))
    assert not out.loss[1:4].isfinite().any()
    like = logits[[0, 4]].clamp(min=-1e4)  # excluded by a large number, not by infinity
    want = q_target_reference(like, torch.ones(2, dtype=torch.int64), objectives.get(name))
    torch.testing.assert_close(out.nll[[0, 4]], want.nll)
    torch.testing.assert_close(out.loss[[0, 4][uniform:]], want.loss[uniform:])


# ---- on a GPU ------------------------------------------------------------------------------------


def on_a_gpu(test: Any) -> Any:
    return pytest.mark.gpu(
        pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")(test)
    )


@on_a_gpu
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_on_a_gpu(name: str, dtype: torch.dtype, path: str) -> None:
    """test_vocab_parallel.py's grid: the truth is computed on the CPU."""
    for seed, variant in enumerate(("plain", "rich")):
        case = random_case(name, seed, width=13, vocab_size=8, dtype=dtype, variant=variant)
        check(case, moved(run(moved(case, "cuda"), path=path), "cpu"))


@on_a_gpu
@pytest.mark.parametrize("name", ["sft", "eaft", "gem", "target-sft"])
def test_captured_in_a_cuda_graph(name: str) -> None:
    """Forward and backward replay on new numbers in the same memory."""
    given = {}
    logits = torch.randn(16, 5000, device="cuda").bfloat16().requires_grad_()
    labels, upstream = (
        torch.zeros(16, dtype=torch.int64, device="cuda"),
        torch.zeros(16, device="cuda"),
    )
    if name == "target-sft":
        given["teacher"] = torch.randn(16, 5000, device="cuda").bfloat16()

    def step() -> list[Tensor]:
        loss = q_target_cross_entropy(logits, labels, objectives.get(name), **given).loss
        return [loss.detach(), *torch.autograd.grad(loss, logits, upstream)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # kernels compile before the capture
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed in range(2):
        g = torch.Generator("cuda").manual_seed(seed)
        with torch.no_grad():
            logits.copy_(torch.randn(16, 5000, generator=g, device="cuda"))
        labels.random_(5000, generator=g)
        upstream.normal_(generator=g)
        graph.replay()
        assert equal(captured, step())
