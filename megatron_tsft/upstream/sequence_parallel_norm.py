"""Torch's norms refuse sequence parallelism only because nobody tags their parameters for the
gradient all-reduce.

Upstream: megatron/core/transformer/torch_norm.py:50 asserts `not config.sequence_parallel`
(0.19.2); TE's and Apex's norms set `parameter.sequence_parallel`, which
core/distributed/finalize_model_grads.py:452 reads. Line 48 refuses `persist_layer_norm`, a choice
of kernel that torch's norm may ignore. Applies: any device; it matters where a layer spec takes
torch's norm (the local one without Apex).
"""

import copy
from typing import Any


def applies() -> bool:
    """The wrapper still refuses (it is not ours yet)."""
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    return WrappedTorchNorm.__new__.__module__ != __name__


def apply() -> None:
    """Build the norm without the refused settings, then tag its parameters as TE does."""
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    build = WrappedTorchNorm.__new__

    def build_tagged(cls: Any, config: Any, *args: Any, **kwargs: Any) -> Any:
        plain = copy.copy(config)
        plain.sequence_parallel = plain.persist_layer_norm = False
        norm: Any = build(cls, plain, *args, **kwargs)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm

    WrappedTorchNorm.__new__ = build_tagged  # type: ignore[method-assign]
