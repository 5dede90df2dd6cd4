"""Why FSDP is refused: what Megatron's wrappers do and ask."""

from types import SimpleNamespace
from typing import Any

import pytest


def test_torchs_wrapper_does_not_divide_gradients() -> None:
    """With --calculate-per-token-loss finalize_model_grads divides by calling scale_gradients: here
    it does nothing.

    Seen in a run of two ranks on the CPU (docs/parallelism.md): losses right, gradient norms 63
    times too large, which is 126 supervised tokens over two ranks.
    """
    from megatron.core.distributed.distributed_data_parallel import DistributedDataParallel
    from megatron.core.distributed.torch_fully_sharded_data_parallel import (
        TorchFullyShardedDataParallel,
    )

    class Buffer:
        scaled = 1.0

        def scale_gradients(self, factor: float) -> None:
            self.scaled *= factor

    for kind, factor in ((DistributedDataParallel, 0.5), (TorchFullyShardedDataParallel, 1.0)):
        buffer = Buffer()
        wrapper: Any = SimpleNamespace(buffers=[buffer], expert_parallel_buffers=[])
        kind.scale_gradients(wrapper, 0.5)
        assert buffer.scaled == factor, kind


def test_megatrons_wants_a_format_of_its_own() -> None:
    import inspect

    from megatron.training import arguments

    # its validation needs a whole command line and an
    # initialised world; the sentence is what a user would read
    if "requires the `fsdp_dtensor` checkpointing format" not in inspect.getsource(
        arguments.validate_args
    ):
        pytest.fail(
            "Megatron-FSDP may take torch_dist now: try it, and lift the refusal in"
            " training/arguments.py"
        )
