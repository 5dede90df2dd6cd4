"""A Llama 3.2's scaling factor of 32 arrives in the model's configuration only with the repair."""

import argparse
from typing import Any

from megatron_tsft.upstream import rope_factor
from tests.fresh import fresh
from tests.upstream.source import check_lines

FLAGS = (
    "--num-layers 2 --hidden-size 16 --num-attention-heads 2 --vocab-size 128"
    " --max-position-embeddings 4096 --position-embedding-type rope"
).split()


def factors() -> dict[str, Any]:
    """(rope_scaling, rope_scaling_factor) of what Megatron makes of the flags, before and after the
    repair."""
    from megatron.core.transformer.transformer_config import TransformerConfig
    from megatron.training import argument_utils
    from megatron.training.arguments import add_megatron_arguments

    def built(*flags: str) -> tuple[bool, float]:
        args = add_megatron_arguments(argparse.ArgumentParser()).parse_args([*FLAGS, *flags])
        transformer = TransformerConfig(num_layers=2, hidden_size=16, num_attention_heads=2)
        config = argument_utils.gpt_config_from_args(args, transformer)
        return config.rope_scaling, config.rope_scaling_factor

    def both() -> list[tuple[bool, float]]:
        return [built("--use-rope-scaling", "--rope-scaling-factor", "32"), built()]

    result: dict[str, Any] = {"applies": [rope_factor.applies()], "before": both()}
    rope_factor.apply()
    result["applies"].append(rope_factor.applies())
    return result | {"after": both()}


def test_the_factor_is_lost_and_found() -> None:
    result = fresh(factors)
    assert result["applies"] == [True, False]
    assert result["before"] == [[True, 8.0], [False, 8.0]]  # 32 was asked for
    assert result["after"] == [[True, 32.0], [False, 8.0]]  # without scaling nothing changes


def test_the_docstring_names_the_right_lines() -> None:
    check_lines(
        rope_factor,
        {("training/argument_utils.py", 464): 'kwargs["rope_scaling"] = args.use_rope_scaling'},
    )
