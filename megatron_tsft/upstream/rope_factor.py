"""`--rope-scaling-factor` never reaches the model: a Llama 3.2 with factor 32 is built with 8.

Upstream: megatron/training/argument_utils.py:464 `gpt_config_from_args` copies rope_scaling and
leaves rope_scaling_factor at its default (0.19.2).
Applies: any device, while that function does not read the argument.
"""

import inspect
from typing import Any


def applies() -> bool:
    """The function does not mention the factor."""
    from megatron.training import argument_utils

    source = inspect.getsource(argument_utils.gpt_config_from_args)
    return "rope_scaling_factor" not in source


def apply() -> None:
    """Set the factor on what the function returns."""
    from megatron.training import argument_utils

    build = argument_utils.gpt_config_from_args

    def gpt_config_from_args(args: Any, *rest: Any, **kwargs: Any) -> Any:
        config = build(args, *rest, **kwargs)
        if args.use_rope_scaling:
            config.rope_scaling_factor = args.rope_scaling_factor
        return config

    argument_utils.gpt_config_from_args = gpt_config_from_args
