"""check_precision refuses what Megatron lets through."""

from argparse import Namespace
from typing import Any

import pytest
import torch

from megatron_tsft.errors import UserError
from megatron_tsft.plan.flags import Flags
from megatron_tsft.plan.precision import FP8, check_precision, cuda_version

A100, ADA, H100, B200, RTX50 = (8, 0), (8, 9), (9, 0), (10, 0), (12, 0)
NEW_CUDA = (13, 0)


def check(
    *,
    device: str = "cuda",
    engine: bool = True,
    capability: tuple[int, int] = H100,
    cuda: tuple[int, int] = NEW_CUDA,
    **given: Any,
) -> None:
    """check_precision of flags by destination; a GPU of today unless told otherwise."""
    check_precision(Flags.of(given), device, engine=engine, capability=capability, cuda=cuda)


def refusal(**given: Any) -> str:
    """The one line that a combination is refused with."""
    with pytest.raises(UserError) as caught:
        check(**given)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- Transformer Engine


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("engine", [True, False])
@pytest.mark.parametrize("impl", [{}, {"transformer_impl": "local"}], ids=["default", "local"])
def test_without_low_precision_nothing_is_asked(
    device: str, engine: bool, impl: dict[str, Any]
) -> None:
    check(device=device, engine=engine, bf16=True, **impl)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"engine": False}, "needs Transformer Engine, which is not installed here"),
        ({"device": "cpu"}, "needs a GPU, this run is on the CPU"),
        (
            {"transformer_impl": "local"},
            "does nothing in local layers: leave --transformer-impl local out",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("recipe", [None, *FP8])
def test_fp8_is_transformer_engines(
    recipe: str | None, given: dict[str, Any], message: str
) -> None:
    text = refusal(fp8="hybrid", fp8_recipe=recipe, capability=B200, **given)
    assert message in text
    assert f"--fp8-format hybrid (--fp8-recipe {recipe or 'delayed'})" in text


def test_fp4_is_transformer_engines() -> None:
    assert "--fp4-format e2m1 (--fp4-recipe nvfp4) needs Transformer Engine" in refusal(
        fp4="e2m1", engine=False
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"engine": False},
            "--transformer-impl transformer_engine needs Transformer Engine, which is not"
            " installed",
        ),
        ({"device": "cpu"}, "--transformer-impl transformer_engine needs a GPU"),
    ],
)
def test_its_layers_without_it(given: dict[str, Any], message: str) -> None:
    assert message in refusal(transformer_impl="transformer_engine", **given)


@pytest.mark.parametrize(
    ("recipe", "flag"), [("fp8_recipe", "--fp8-format"), ("fp4_recipe", "--fp4-format")]
)
def test_a_recipe_without_its_format_would_be_bf16_in_silence(recipe: str, flag: str) -> None:
    assert f"does nothing without {flag}" in refusal(**{recipe: "custom"})


# ---- the GPU


@pytest.mark.parametrize(
    ("recipe", "gpus"),
    [
        ("delayed", [ADA, H100, B200, RTX50]),
        ("tensorwise", [ADA, H100, B200, RTX50]),
        ("blockwise", [H100, B200, RTX50]),
        ("mxfp8", [B200]),
    ],
)
def test_which_gpu_has_which_recipe(recipe: str, gpus: list[tuple[int, int]]) -> None:
    """As transformer_engine/pytorch/quantization.py 2.20 says."""
    for capability in (A100, ADA, H100, B200, RTX50):
        if capability in gpus:
            check(fp8="hybrid", fp8_recipe=recipe, capability=capability)
        else:
            text = refusal(fp8="hybrid", fp8_recipe=recipe, capability=capability)
            assert f"this GPU has compute capability {capability[0]}.{capability[1]}" in text


def test_a_refused_gpu_hears_what_it_has() -> None:
    assert "--fp8-recipe delayed or tensorwise or blockwise" in refusal(
        fp8="e4m3", fp8_recipe="mxfp8"
    )
    assert refusal(fp8="hybrid", capability=A100).endswith("train in bf16")


def test_nvfp4_is_blackwells() -> None:
    check(fp4="e2m1", capability=B200)
    assert "(--fp4-recipe nvfp4) runs on Blackwell" in refusal(fp4="e2m1", capability=H100)


def test_blockwise_needs_a_new_cuda() -> None:
    check(fp8="e4m3", fp8_recipe="blockwise", cuda=(12, 9))
    assert "needs CUDA 12.9, torch has 12.8" in refusal(
        fp8="e4m3", fp8_recipe="blockwise", cuda=(12, 8)
    )


def test_torchs_version_is_read() -> None:
    version = cuda_version()
    assert (version == (0, 0)) == (torch.version.cuda is None)
    assert torch.version.cuda is None or torch.version.cuda.startswith(f"{version[0]}.{version[1]}")


# ---- weights that are FP8 themselves


def test_weights_in_fp8_with_delayed_scales_lose_small_numbers() -> None:
    """What the refusal is about, in torch's own FP8: with a scale of 1 small weights are lost, with
    their own not."""
    weights = 0.006 * torch.randn(1 << 16, generator=torch.Generator().manual_seed(0))

    def stored(scale: float) -> torch.Tensor:
        return (weights * scale).to(torch.float8_e4m3fn).float() / scale

    own = 448 / weights.abs().max().item()
    assert (stored(1.0) == 0).float().mean() > 0.1
    assert (stored(own) == 0).float().mean() < 1e-3
    assert "--fp8-param-gather does not go with" in refusal(fp8="hybrid", fp8_param_gather=True)
    check(fp8="hybrid", fp8_recipe="tensorwise", fp8_param_gather=True)


@pytest.mark.parametrize("gather", ["fp8_param_gather", "fp4_param_gather", None])
def test_start_weights_come_from_the_checkpoint_where_the_model_holds_fp8(
    gather: str | None,
) -> None:
    plain = {"fp8_param_gather": False, "fp4_param_gather": False}
    plain |= {"load_main_params_from_ckpt": False, "stream_ckpt_dequant": True}
    args = Namespace(**plain)
    if gather is not None:
        setattr(args, gather, True)
    from megatron_tsft.training.start import keep_start_weights

    keep_start_weights(args)
    changed = (
        {gather: True, "load_main_params_from_ckpt": True, "stream_ckpt_dequant": False}
        if gather
        else {}
    )
    assert vars(args) == plain | changed
