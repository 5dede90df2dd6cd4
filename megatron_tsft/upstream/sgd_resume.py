"""Plain gradient descent does not resume.

Upstream: megatron/core/optimizer/__init__.py (0.19.2), line 624, has no function that makes SGD's
state, and optimizer.py calls it when a checkpoint is loaded (lines 1129 and 1362).
Applies: always, until that line has one.
"""

from typing import Any


def applies() -> bool:
    """The optimizers' base class is not repaired yet."""
    from megatron.core.optimizer.optimizer import MegatronOptimizer

    return MegatronOptimizer.__init__.__module__ != __name__


def apply() -> None:
    """Where no function is given, momentum is made, which the load then fills."""
    from megatron.core.optimizer.optimizer import MegatronOptimizer

    initialize = MegatronOptimizer.__init__

    def initialize_with_states(
        self: Any, optimizer: Any, config: Any, init_state_fn: Any = None
    ) -> None:
        initialize(self, optimizer, config, init_state_fn or make_momentum)

    MegatronOptimizer.__init__ = initialize_with_states


def make_momentum(optimizer: Any, config: Any = None) -> None:
    """Zeros, from which torch's SGD goes on as from no buffer."""
    import torch

    for group in optimizer.param_groups:
        if group.get("momentum"):
            for parameter in group["params"]:
                state = optimizer.state[parameter]
                if state.get("momentum_buffer") is None:
                    state["momentum_buffer"] = torch.zeros_like(parameter)
