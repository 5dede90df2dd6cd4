"""An objective of your own, in one file: trust the label by p^alpha, give the rest to the guided
residual.

    --tsft-plugin examples/plugins/power_target.py --tsft-objective power-target --tsft-args
    alpha=0.5 eta=0.3

`stats` holds named per-token tensors; what a row returns is the target, and every kernel, layout
and teacher follows.
"""

from typing import Annotated

import torch

from megatron_tsft import objectives
from megatron_tsft.objectives import Coefficients, Range, Statistics


@objectives.register("power-target", source="example", teacher="optional")
def power_target(
    stats: Statistics,
    *,
    alpha: Annotated[float, Range(0)] = 0.5,
    eta: Annotated[float, Range(0, 1)] = 0.3,
) -> Coefficients:
    """CE(Q), Q = p(y)^alpha onehot(y) + (1 - p(y)^alpha) softmax((1 - eta) log p + eta log T)"""
    log_trust = alpha * stats.logp_y
    return Coefficients(
        imitation=torch.exp(log_trust), residual=-torch.expm1(log_trust), a=1 - eta, b=eta
    )
