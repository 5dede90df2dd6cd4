"""Without TE and Apex the distributed optimizer does not resume.

Upstream: megatron/core/optimizer/distrib_optimizer.py (0.19.2): line 839 asserts one `step` before
any state exists; line 1223 looks up tensors["step"], which is never saved; line 1032 gives every
parameter the one step tensor of line 1028, which torch's Adam then increments once per parameter.
Applies: any device, where HAVE_APEX_OR_TE is False.
"""

from typing import Any


def applies() -> bool:
    """Torch's own Adam is in use and the class is not repaired yet."""
    from megatron.core.optimizer import distrib_optimizer

    repaired = distrib_optimizer.DistributedOptimizer.load_state_dict.__module__ == __name__
    return not distrib_optimizer.HAVE_APEX_OR_TE and not repaired


def apply() -> None:
    """Create states before the load asks for them, name the missing step, and give every parameter
    its own."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    sharded_state_dict = DistributedOptimizer.sharded_state_dict
    load_state_dict = DistributedOptimizer.load_state_dict
    set_states = DistributedOptimizer._set_main_param_and_optimizer_states

    def sharded_state_dict_with_states(
        self: Any,
        model_sharded_state_dict: Any,
        is_loading: bool = False,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if is_loading and not self.optimizer.state:
            self._init_optimizer_states_with_dummy_values()
        return sharded_state_dict(self, model_sharded_state_dict, is_loading, *args, **kwargs)

    def load_state_dict_own_steps(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = load_state_dict(self, *args, **kwargs)
        for state in self.optimizer.state.values():
            state["step"] = state["step"].clone()
        return result

    def set_states_with_step(self: Any, model_param: Any, tensors: dict[str, Any]) -> Any:
        return set_states(self, model_param, {"step": None, **tensors})

    DistributedOptimizer.sharded_state_dict = sharded_state_dict_with_states  # pyright: ignore[reportAttributeAccessIssue]
    DistributedOptimizer.load_state_dict = load_state_dict_own_steps
    DistributedOptimizer._set_main_param_and_optimizer_states = set_states_with_step
