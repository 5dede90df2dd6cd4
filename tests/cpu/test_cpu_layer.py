"""The CPU layer: what names a cuda device lands on the CPU; nothing on the GPU path imports it."""

import importlib
import os
import sys
from typing import Any

import pytest
import torch

from tests.fresh import REPOSITORY, fresh
from tests.ranks import run_ranks


def with_the_layer() -> dict[str, Any]:
    """What the tests below look at, in one process that starts as rank 1 of 2."""
    os.environ.update(LOCAL_RANK="1", LOCAL_WORLD_SIZE="2")
    from megatron_tsft import cpu

    cpu.install()
    cpu.install()  # a second time changes nothing
    return {"devices": devices(), "names": loop_names(), "reduced": run_ranks(2, one_rank)}


@pytest.fixture(scope="module")
def installed() -> dict[str, Any]:
    return fresh(with_the_layer)


def devices() -> dict[str, Any]:
    """Every way of naming a GPU."""
    host, first = torch.arange(4.0), torch.device("cuda", 0)
    made = {
        "keyword string": torch.zeros(2, device="cuda"),
        "keyword string with index": torch.empty(2, device="cuda:1"),
        "keyword device": torch.full((2,), 3.0, device=first),
        "keyword index": torch.ones(2, device=torch.cuda.current_device()),
        "tensor": torch.tensor([1, 2], device="cuda"),
        "arange": torch.arange(3, device="cuda"),
        "randn": torch.randn(3, device=first),
        "like": torch.zeros_like(host, device="cuda"),
        "new": host.new_empty(3, device=first),
        "to string": host.to("cuda"),
        "to device and dtype": host.to(first, torch.bfloat16),
        "to keyword": host.to(device="cuda", dtype=torch.float64),
        "to index": host.to(0),
        "linear": torch.nn.Linear(2, 2, device="cuda").weight,
        "module.to": torch.nn.Linear(2, 2).to("cuda").weight,
        "module.cuda": torch.nn.Linear(2, 2).cuda().weight,
    }
    return {
        "devices": {name: tensor.device.type for name, tensor in made.items()},
        "values": [made["keyword device"].tolist(), made["to device and dtype"].tolist()],
        "dtypes": [
            str(made["to device and dtype"].dtype),
            str(made["to keyword"].dtype),
            str(host.to(torch.int8).dtype),
        ],
        "same object": [
            host.cuda() is host,
            host.cuda(0) is host,
            host.pin_memory() is host,
            host.to("cuda") is host,
        ],
        "cpu stays": torch.zeros(1, device="cpu").device.type,
        "types": [
            torch.zeros(1, dtype=dtype).type()
            for dtype in (torch.float32, torch.bfloat16, torch.int64)
        ],
        "cast": [
            host.type(torch.float16).dtype == torch.float16,
            host.type("torch.FloatTensor").dtype == torch.float32,
        ],
        "available": torch.cuda.is_available(),
        "megatron": "megatron.training.training" in sys.modules,
    }


def test_cuda_devices_land_on_the_cpu(installed: dict[str, Any]) -> None:
    result = installed["devices"]
    assert set(result["devices"].values()) == {"cpu"}, result["devices"]
    assert result["values"] == [[3.0, 3.0], [0.0, 1.0, 2.0, 3.0]]
    assert result["dtypes"] == ["torch.bfloat16", "torch.float64", "torch.int8"]
    assert result["same object"] == [True] * 4
    assert result["cpu stays"] == "cpu"
    assert result["types"] == [
        "torch.cuda.FloatTensor",
        "torch.cuda.BFloat16Tensor",
        "torch.cuda.LongTensor",
    ]
    assert result["cast"] == [True, True]
    assert result["available"] is False and result["megatron"]


def loop_names() -> dict[str, Any]:
    """What Megatron's loop asks of torch.cuda: streams, events, memory, random states, a backward
    that allocates."""
    from megatron.core import tensor_parallel
    from megatron.training import training

    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    with torch.cuda.stream(torch.cuda.Stream()), torch.cuda.device(0):
        torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
        torch.cuda.nvtx.range_push("text")
        torch.cuda.nvtx.range_pop()
    torch.cuda.synchronize()
    torch.cuda.set_device("cuda:0")
    end.record()

    torch.cuda.manual_seed(7)
    state = torch.cuda.get_rng_state()
    drawn = [
        torch.rand(3, device="cuda").tolist(),
        torch.manual_seed(7).seed and torch.rand(3).tolist(),
    ]
    torch.cuda.set_rng_state(state)
    drawn.append(torch.rand(3).tolist())

    tracker: Any = tensor_parallel.get_cuda_rng_tracker()
    tracker.reset()
    tracker.add("here", 5)
    torch.manual_seed(1)
    outside = [torch.rand(1).item()]
    with tracker.fork("here"):
        inside = torch.rand(1).item()
    outside.append(torch.rand(1).item())
    torch.manual_seed(1)
    return {
        "ids": [torch.cuda.current_device(), torch.cuda.device_count()],
        "memory": [
            torch.cuda.memory_allocated(),
            torch.cuda.mem_get_info()[0] > 0,
            torch.cuda.memory_stats()["any"],
        ],
        "time": start.elapsed_time(end),
        "drawn": drawn,
        "outside": [outside, [torch.rand(1).item(), torch.rand(1).item()]],
        "inside": [inside, torch.manual_seed(5) and torch.rand(1).item()],
        "backward": [backward_devices(call) for call in (call_tensor, call_autograd, call_engine)],
        "initialize": training.initialize_megatron.keywords,
        "warm-up": training.set_jit_fusion_options(),
    }


class Allocates(torch.autograd.Function):
    """As Megatron's layers do under sequence parallel, the backward makes its buffer on the current
    CUDA device."""

    where: list[str] = []

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> torch.Tensor:
        buffer = torch.empty(3, device=torch.cuda.current_device())
        Allocates.where.append(buffer.device.type)
        return buffer.copy_(gradients[0]) * 2


def call_tensor(loss: torch.Tensor) -> None:
    loss.backward(retain_graph=True)


def call_autograd(loss: torch.Tensor) -> None:
    torch.autograd.backward(loss, grad_tensors=None)


def call_engine(loss: torch.Tensor) -> None:
    """As Megatron's pipeline schedule does."""
    torch.autograd.Variable._execution_engine.run_backward(
        (loss,),
        (torch.ones_like(loss),),
        False,
        False,
        (),
        allow_unreachable=True,
        accumulate_grad=True,
    )


def backward_devices(call: Any) -> list[Any]:
    x = torch.ones(3, requires_grad=True)
    call(Allocates.apply(x).sum())
    after = torch.empty(1, device="cuda")  # the mode is on as before
    assert x.grad is not None
    return [Allocates.where.pop(), x.grad.tolist(), after.device.type]


def test_the_names_of_torch_cuda_that_the_loop_uses(installed: dict[str, Any]) -> None:
    result = installed["names"]
    assert result["ids"] == [1, 2]
    assert result["memory"] == [0, True, 0]
    assert 0 <= result["time"] < 60_000
    assert result["drawn"][0] == result["drawn"][1] == result["drawn"][2]  # one generator
    assert (
        result["outside"][0] == result["outside"][1]
    )  # a fork of Megatron's tracker leaves the outer state alone
    assert result["inside"][0] == result["inside"][1]
    assert result["backward"] == [["cpu", [2.0] * 3, "cpu"]] * 3
    assert result["initialize"] == {"allow_no_cuda": True} and result["warm-up"] is None


def without_the_layer() -> dict[str, Any]:
    """What the layer says where there is a GPU, what importing the package brings in, and what the
    layer says then."""
    from megatron_tsft import cpu

    torch.cuda.is_available = lambda: True
    torch.cuda.device_count = lambda: 1  # pyright: ignore[reportAttributeAccessIssue]
    said = refusal(cpu.install)
    torch.cuda.is_available = lambda: False
    for name in [name for name in sys.modules if name.startswith("megatron_tsft")]:
        del sys.modules[name]  # so that the imports below are seen

    files = sorted(
        path.relative_to(REPOSITORY).with_suffix("")
        for path in (REPOSITORY / "megatron_tsft").rglob("*.py")
    )
    rooms = {"cpu", "triton"}  # the layer itself, and what needs a GPU to be imported
    names = [
        ".".join(file.parts).removesuffix(".__init__")
        for file in files
        if not rooms & set(file.parts)
    ]
    for name in names:
        importlib.import_module(name)
    layer = [name for name in sys.modules if name.startswith("megatron_tsft.cpu")]
    return {
        "gpu": said,
        "names": names,
        "layer": layer,
        "late": refusal(cpu.install),
        "type": torch.zeros(1).type(),
    }


def refusal(action: Any) -> str:
    try:
        action()
    except RuntimeError as error:
        return str(error)
    return "nothing was raised"


@pytest.fixture(scope="module")
def not_installed() -> dict[str, Any]:
    return fresh(without_the_layer)


def test_no_import_of_the_package_brings_the_layer_in(not_installed: dict[str, Any]) -> None:
    rooms = {name.split(".")[1] for name in not_installed["names"] if "." in name}
    assert {"checkpoint", "data", "loss", "model", "objectives", "training", "upstream"} <= rooms
    assert not_installed["layer"] == []


def test_it_refuses_a_gpu_and_an_earlier_import_of_megatron(not_installed: dict[str, Any]) -> None:
    assert "set CUDA_VISIBLE_DEVICES= (empty)" in not_installed["gpu"]
    assert not_installed["late"] == "install the CPU layer before importing megatron"
    assert not_installed["type"] == "torch.FloatTensor"  # nothing was half-installed


def one_rank(rank: int) -> list[float]:
    total = torch.full((2,), float(rank + 1), device="cuda")
    torch.distributed.all_reduce(total)
    return total.tolist()


def test_collectives_run_over_gloo(installed: dict[str, Any]) -> None:
    assert installed["reduced"] == [[3.0, 3.0]] * 2
