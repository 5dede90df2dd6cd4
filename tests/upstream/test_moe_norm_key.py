"""The norm before experts has one name in a checkpoint, whichever spec saved it, only with the
repair."""

from typing import Any

from megatron_tsft.upstream import moe_norm_key
from tests.fresh import fresh
from tests.upstream.source import check_lines

ATTENTION = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
DENSE = ATTENTION | {"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}


def key_maps() -> dict[str, Any]:
    """The key maps that Megatron's local spec has with experts and without, before and after the
    repair."""
    from megatron.core.models.gpt import gpt_layer_specs

    def key_map(*args: Any, **kwargs: Any) -> dict[str, str]:
        spec: Any = gpt_layer_specs.get_gpt_layer_local_spec(*args, **kwargs)
        return spec.submodules.sharded_state_dict_keys_map

    def all_of_them() -> list[dict[str, str]]:
        norms = {"normalization": "RMSNorm", "qk_layernorm": True}
        return [key_map(4), key_map(num_experts=4, **norms), key_map(), key_map(None, **norms)]

    result: dict[str, Any] = {"applies": [moe_norm_key.applies()], "before": all_of_them()}
    moe_norm_key.apply()
    result["applies"].append(moe_norm_key.applies())
    return result | {"after": all_of_them()}


def test_the_norm_before_experts_keeps_its_name() -> None:
    result = fresh(key_maps)
    assert result["applies"] == [True, False]
    assert result["before"] == [
        DENSE,
        DENSE,
        DENSE,
        DENSE,
    ]  # experts have no linear_fc1 that the norm could belong to
    assert result["after"] == [
        ATTENTION,
        ATTENTION,
        DENSE,
        DENSE,
    ]  # without experts nothing changes


def test_the_docstring_names_the_right_lines() -> None:
    line = '"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",'
    check_lines(moe_norm_key, {("core/models/gpt/gpt_layer_specs.py", 461): line})
