"""Inert stand-ins for the torch.cuda names that Megatron's loop touches."""

import collections
import contextlib
import os
import time
import types
from collections.abc import Callable
from typing import Any

import torch

MEMORY = 1 << 33  # bytes; what memory queries answer


class Stream:
    """One stream: everything is in order already."""

    device = torch.device("cpu")
    cuda_stream = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def wait_stream(self, stream: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def record_event(self, event: Any = None) -> "Event":
        return event or Event()

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *exc: Any) -> None: ...


class Event:
    """A wall-clock event."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.time = 0.0

    def record(self, stream: Any = None) -> None:
        self.time = time.perf_counter()

    def wait(self, stream: Any = None) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: "Event") -> float:
        return (other.time - self.time) * 1e3


def nothing(*args: Any, **kwargs: Any) -> None:
    """Does nothing."""


def stand_ins() -> dict[str, Any]:
    """Name in torch.cuda -> stand-in."""
    stream = Stream()
    inert = (
        "set_device synchronize empty_cache ipc_collect set_stream reset_peak_memory_stats"
        " _lazy_init "
        # seeding every "device" would recurse into the CPU generator, which is the one device here
        "manual_seed_all"
    )
    zero = "memory_allocated max_memory_allocated memory_reserved max_memory_reserved"
    properties = types.SimpleNamespace(
        name="cpu", major=0, minor=0, multi_processor_count=1, total_memory=MEMORY, warp_size=32
    )
    return {
        **dict.fromkeys(inert.split(), nothing),
        **dict.fromkeys(zero.split(), lambda *a, **k: 0),
        "Stream": Stream,
        "Event": Event,
        "device_count": lambda: int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        "current_device": lambda: int(os.environ.get("LOCAL_RANK", "0")),
        "current_stream": lambda *a: stream,
        "default_stream": lambda *a: stream,
        "stream": lambda s: contextlib.nullcontext(),
        "device": lambda d: contextlib.nullcontext(),
        "mem_get_info": lambda *a: (MEMORY, MEMORY),
        "memory_stats": lambda *a, **k: collections.defaultdict(int),
        "get_device_properties": lambda *a: properties,
        "get_device_capability": lambda *a: (0, 0),
        "get_device_name": lambda *a: "cpu",
        "is_current_stream_capturing": lambda: False,
        # the "cuda" random state is the CPU generator's, so
        # that Megatron's RNG tracker keeps its meaning
        "manual_seed": lambda seed: torch.default_generator.manual_seed(int(seed)),
        "get_rng_state": lambda *a, **k: torch.get_rng_state(),
        "set_rng_state": lambda state, *a, **k: torch.set_rng_state(state),
        "default_generators": (torch.default_generator,) * 64,
        "_lazy_call": lambda function, **k: function(),
    }


def own(value: Any) -> Any:
    """A distinct function object per name: dynamo's rule map refuses one object under two names."""
    if not isinstance(value, types.FunctionType):
        return value

    def stand_in(*args: Any, _call: Callable[..., Any] = value, **kwargs: Any) -> Any:
        return _call(*args, **kwargs)

    return stand_in


def install() -> None:
    """Put the stand-ins into torch.cuda."""
    names = stand_ins()
    for name, value in names.items():
        setattr(torch.cuda, name, own(value))
    for name in ("get_rng_state", "set_rng_state"):
        setattr(torch.cuda.random, name, own(names[name]))
    for name in ("range_push", "range_pop", "mark"):
        setattr(torch.cuda.nvtx, name, own(nothing))
