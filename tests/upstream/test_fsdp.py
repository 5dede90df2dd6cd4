"""Why FSDP is refused: what Megatron's wrappers do not do, by their own code."""

import inspect


def test_torchs_wrapper_does_not_divide_gradients() -> None:
    """With --calculate-per-token-loss finalize_model_grads divides by calling this: here it does nothing.

    Seen in a run of two ranks on the CPU (docs/parallelism.md): losses right, gradient norms 63 times too large, which
    is 126 supervised tokens over two ranks.
    """
    from megatron.core.distributed.data_parallel_base import _BaseDataParallel
    from megatron.core.distributed.distributed_data_parallel import DistributedDataParallel
    from megatron.core.distributed.finalize_model_grads import finalize_model_grads
    from megatron.core.distributed.torch_fully_sharded_data_parallel import TorchFullyShardedDataParallel

    assert TorchFullyShardedDataParallel.scale_gradients is _BaseDataParallel.scale_gradients
    assert DistributedDataParallel.scale_gradients is not _BaseDataParallel.scale_gradients
    assert inspect.getsource(_BaseDataParallel.scale_gradients).rstrip().endswith("pass")
    assert "model_chunk.scale_gradients(scaling)" in inspect.getsource(finalize_model_grads)


def test_megatrons_wants_a_format_of_its_own() -> None:
    from megatron.training import arguments

    source = inspect.getsource(arguments.validate_args)
    assert 'assert args.ckpt_format == "fsdp_dtensor"' in source
