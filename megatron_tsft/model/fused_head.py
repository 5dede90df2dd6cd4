"""What Megatron expects of an LM head that it does not call itself: who may be replaced, and hooks
that must fire.

The head's own communication, its `main_grad` and the placeholder gradient are in
loss/linear_head.py.
"""

from typing import Any

from megatron.core.tensor_parallel import ColumnParallelLinear
from torch import Tensor


def why_not_fused(output_layer: Any) -> str | None:
    """Why this head cannot be part of the loss, or None where it can."""
    if type(output_layer) is not ColumnParallelLinear:
        return (
            f"the output layer is {type(output_layer).__name__}, not a plain ColumnParallelLinear"
        )
    if output_layer.bias is not None:
        return "the output layer has a bias"
    if output_layer.gather_output:
        return "the output layer gathers its output over the vocabulary"
    if output_layer.config.defer_embedding_wgrad_compute:
        return "--defer-embedding-wgrad-compute expects the head's own backward"
    if output_layer.gtp_remat_size > 1:
        return "the output layer's weight is sharded once more (generalized tensor parallelism)"
    if (
        output_layer._forward_hooks
        or output_layer._backward_hooks
        or output_layer._backward_pre_hooks
    ):
        return "the output layer has hooks that need its output"
    return None


def head_weight(output_layer: Any, output_weight: Tensor | None, hidden: Tensor) -> Tensor:
    """This rank's rows of the head, ready to be read.

    Forward pre-hooks fire first: with `--overlap-param-gather` one of them waits for the weight,
    which may still be on its way (megatron/core/distributed/distributed_data_parallel.py:432-466,
    0.19.2).

    Raises:
        RuntimeError: the head cannot be fused, or a hook wants to change the input.
    """
    reason = why_not_fused(output_layer)
    if reason:
        raise RuntimeError(f"--tsft-fuse-head: {reason}; leave the flag out")
    with_keywords = output_layer._forward_pre_hooks_with_kwargs
    for key, hook in output_layer._forward_pre_hooks.items():
        if key in with_keywords:
            changed = hook(output_layer, (hidden,), {"weight": output_weight})
        else:
            changed = hook(output_layer, (hidden,))
        if changed is not None:
            raise RuntimeError(
                "--tsft-fuse-head: a forward pre-hook of the output layer replaces its input"
            )
    weight = output_layer.weight if output_weight is None else output_weight
    if hasattr(weight, "__fsdp_param__"):
        raise RuntimeError(
            "--tsft-fuse-head: Megatron-FSDP shards the head's weight; leave the flag out"
        )
    return weight
