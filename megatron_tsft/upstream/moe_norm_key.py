"""A model with experts names the norm before them otherwise in the local layers than in Transformer
Engine's.

One checkpoint could then not serve both. Upstream: megatron/core/models/gpt/gpt_layer_specs.py:461
`get_gpt_layer_local_submodules` saves `pre_mlp_layernorm` as `mlp.linear_fc1.layer_norm_*` also
where the MLP has experts and no linear_fc1, while the other specs leave its name as it is (0.19.2).
Applies: any device, while the local spec with experts does that.
"""

from typing import Any

NORM = "pre_mlp_layernorm."


def applies() -> bool:
    """The local spec with experts renames the norm."""
    from megatron.core.models.gpt import gpt_layer_specs

    return (
        NORM
        in gpt_layer_specs.get_gpt_layer_local_submodules(num_experts=2).sharded_state_dict_keys_map
    )


def apply() -> None:
    """Leave the norm's name as it is where there are experts."""
    from megatron.core.models.gpt import gpt_layer_specs

    build = gpt_layer_specs.get_gpt_layer_local_submodules

    def get_gpt_layer_local_submodules(
        num_experts: int | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        submodules = build(num_experts, *args, **kwargs)
        if num_experts is not None:
            submodules.sharded_state_dict_keys_map.pop(NORM, None)
        return submodules

    gpt_layer_specs.get_gpt_layer_local_submodules = get_gpt_layer_local_submodules
