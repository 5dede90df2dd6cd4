"""A head that Megatron does not call itself: its pre-hooks fire, and what cannot be fused is
refused by name."""

from typing import Any

import pytest
import torch

from tests.fresh import fresh


def with_heads() -> dict[str, Any]:
    """On one rank: what `head_weight` does to a plain output layer, and what it says of others."""
    import torch.distributed as dist

    from megatron_tsft import cpu

    cpu.install()
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import ColumnParallelLinear
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_tsft.model.fused_head import head_weight

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # pyright: ignore
    parallel_state.initialize_model_parallel()

    class OtherHead(ColumnParallelLinear):
        """Stands for Transformer Engine's."""

    def head(
        kind: Any = ColumnParallelLinear, changes: dict[str, Any] | None = None, **keywords: Any
    ) -> Any:
        config = TransformerConfig(
            num_layers=1, hidden_size=4, num_attention_heads=1, use_cpu_initialization=True
        )
        layer = kind(
            4,
            6,
            config=config,
            init_method=torch.nn.init.normal_,
            bias=keywords.pop("bias", False),
            gather_output=keywords.pop("gather_output", False),
            **keywords,
        )
        for key, value in (changes or {}).items():
            setattr(config, key, value)
        return layer

    hidden, out, calls = torch.ones(2, 1, 4), {}, []
    plain = head()
    plain.register_forward_pre_hook(
        lambda module, arguments: calls.append([len(arguments), module is plain])
    )
    plain.register_forward_pre_hook(
        lambda module, arguments, keywords: calls.append(sorted(keywords)), with_kwargs=True
    )
    out["own weight"] = head_weight(plain, None, hidden) is plain.weight
    shared = torch.nn.Parameter(torch.zeros(6, 4))
    out["shared weight"] = head_weight(plain, shared, hidden) is shared
    out["calls"] = calls

    replaced = head()
    replaced.register_forward_pre_hook(lambda module, arguments: (2 * arguments[0],))
    watched = head()
    watched.register_forward_hook(lambda module, arguments, output: None)
    sharded = head()
    sharded.weight.__fsdp_param__ = True
    refused = {
        "another class": head(OtherHead),
        "bias": head(bias=True),
        "gathers": head(gather_output=True),
        "deferred": head(changes={"defer_embedding_wgrad_compute": True}),
        "forward hook": watched,
        "replaces its input": replaced,
        "FSDP": sharded,
    }
    for name, layer in refused.items():
        try:
            head_weight(layer, None, hidden)
            out[name] = ""
        except RuntimeError as error:
            out[name] = str(error)
    return out


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    return fresh(with_heads)


@pytest.mark.slow
def test_pre_hooks_fire_before_the_weight_is_read(result: dict[str, Any]) -> None:
    assert result["own weight"] and result["shared weight"]
    assert result["calls"] == 2 * [[1, True], ["weight"]]


@pytest.mark.slow
def test_what_cannot_be_fused_is_refused(result: dict[str, Any]) -> None:
    says = {
        "another class": "OtherHead, not a plain ColumnParallelLinear",
        "bias": "has a bias",
        "gathers": "gathers its output",
        "deferred": "--defer-embedding-wgrad-compute",
        "forward hook": "hooks that need its output",
        "replaces its input": "replaces its input",
        "FSDP": "Megatron-FSDP",
    }
    for name, text in says.items():
        assert result[name].startswith("--tsft-fuse-head: ") and text in result[name], (
            name,
            result[name],
        )
