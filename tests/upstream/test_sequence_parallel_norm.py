"""Torch's norms under sequence parallelism: refused upstream; with the repair their gradients are
those of TP 1."""

from typing import Any

import pytest
import torch

from megatron_tsft.upstream import sequence_parallel_norm
from tests.fresh import fresh
from tests.ranks import run_ranks
from tests.upstream.source import check_lines
from tests.upstream.tiny_gpt import backward, tiny_gpt


def build_norms() -> dict[str, Any]:
    """What the wrapper says to each setting, before and after the repair: the refusal, or the
    parameters' tags."""
    from megatron.core.transformer.torch_norm import WrappedTorchNorm
    from megatron.core.transformer.transformer_config import TransformerConfig

    def build(**settings: Any) -> Any:
        size = {
            "num_layers": 1,
            "hidden_size": 8,
            "num_attention_heads": 2,
            "tensor_model_parallel_size": 2,
        }
        rest: dict[str, Any] = (
            size | {"normalization": "RMSNorm", "persist_layer_norm": False} | settings
        )
        config = TransformerConfig(**rest)
        given = (config.sequence_parallel, config.persist_layer_norm)
        try:
            norm: Any = WrappedTorchNorm(config, 8, eps=1e-6)
        except AssertionError as error:
            return str(error)
        assert (
            config.sequence_parallel,
            config.persist_layer_norm,
        ) == given  # the model's own configuration stays
        assert type(norm) is torch.nn.RMSNorm and norm.eps == 1e-6
        parameters: list[Any] = list(norm.parameters())
        return [parameter.sequence_parallel for parameter in parameters]

    def build_all() -> list[Any]:
        settings = (
            {"sequence_parallel": True},
            {"persist_layer_norm": True},
            {"layernorm_zero_centered_gamma": True},
        )
        return [build(**each) for each in settings]

    result: dict[str, Any] = {"applies": [sequence_parallel_norm.applies()], "before": build_all()}
    sequence_parallel_norm.apply()
    result["applies"].append(sequence_parallel_norm.applies())
    return result | {"after": build_all()}


def build_and_train() -> dict[str, Any]:
    """`build_norms`, and name -> gradient of every norm at TP 1 and at TP 2 with sequence
    parallelism (both ranks)."""
    from megatron_tsft import cpu

    cpu.install()
    return build_norms() | {"gradients": run_ranks(1, one_rank, 1) + run_ranks(2, one_rank, 2)}


def one_rank(_: int, tp: int) -> dict[str, list[float]]:
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    parallel_state.initialize_model_parallel(tp)
    model_parallel_cuda_manual_seed(1)
    model = tiny_gpt(
        tensor_model_parallel_size=tp, sequence_parallel=tp > 1, persist_layer_norm=True
    )
    backward(model, seed=5)
    return {name: p.main_grad.tolist() for name, p in model.named_parameters() if p.dim() == 1}


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    return fresh(build_and_train)


def test_refused_upstream_and_tagged_with_the_repair(result: dict[str, Any]) -> None:
    assert result["applies"] == [True, False]
    sequence, persist, centered = result["before"]
    assert (
        "sequence parallel not supported" in sequence
        and "persist_layer_norm not supported" in persist
    )
    assert result["after"] == [[True], [False], centered]
    assert (
        "zero_centered_gamma not supported" in centered
    )  # still refused: torch's norm would compute something else


def test_gradients_are_those_of_one_rank(result: dict[str, Any]) -> None:
    alone, first, second = result["gradients"]
    assert len(alone) == 5  # two a layer and the final one
    for name, gradient in alone.items():
        assert max(map(abs, gradient)) > 1e-4
        assert first[name] == second[name]
        assert first[name] == pytest.approx(gradient, rel=1e-4, abs=1e-7), name


def test_the_docstring_names_the_right_lines() -> None:
    lines = {
        ("core/transformer/torch_norm.py", 48): "assert not config.persist_layer_norm",
        ("core/transformer/torch_norm.py", 50): "assert not config.sequence_parallel",
        (
            "core/distributed/finalize_model_grads.py",
            452,
        ): 'getattr(param, "sequence_parallel", False)',
    }
    check_lines(sequence_parallel_norm, lines)
