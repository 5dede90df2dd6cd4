"""What a precision asks: Transformer Engine, and a GPU that has its number format.

Megatron's own validation passes FP8 with local layers, without Transformer Engine, and every recipe
on every GPU; what follows is a crash in the first step, or none and bf16 under the name of FP8.
"""

import os
from dataclasses import dataclass

import torch

from megatron_tsft.errors import UserError
from megatron_tsft.plan.flags import Flags


@dataclass(frozen=True)
class Recipe:
    """A way to scale 8-bit or 4-bit numbers; its conditions are Transformer Engine's (2.20,
    pytorch/quantization.py).

    Attributes:
        block: what the tokens of one rank must be a multiple of (Megatron's get_fp8_align_size,
            get_fp4_align_size).
        lowest: the first compute capability that has it.
        below: the first one that has it no longer.
        gpus: those, by name.
        cuda: the first CUDA version that has it.
    """

    block: int
    lowest: tuple[int, int]
    gpus: str
    below: tuple[int, int] = (100, 0)
    cuda: tuple[int, int] = (0, 0)

    def runs_on(self, capability: tuple[int, int]) -> bool:
        return self.lowest <= capability < self.below


FP8 = {
    "delayed": Recipe(16, (8, 9), "Ada, Hopper and Blackwell"),
    "tensorwise": Recipe(16, (8, 9), "Ada, Hopper and Blackwell"),
    "blockwise": Recipe(16, (9, 0), "Hopper, emulated on Blackwell", cuda=(12, 9)),
    "mxfp8": Recipe(32, (10, 0), "the Blackwell of data centers: B200, GB200, B300", below=(12, 0)),
    "custom": Recipe(16, (8, 9), "Ada, Hopper and Blackwell"),
}
FP4 = {name: Recipe(128, (10, 0), "Blackwell") for name in ("nvfp4", "custom")}
DEFAULTS = {"fp8": "delayed", "fp4": "nvfp4"}  # Megatron's


def check_precision(
    flags: Flags,
    device: str,
    *,
    engine: bool,
    capability: tuple[int, int] | None = None,
    cuda: tuple[int, int] | None = None,
) -> None:
    """Raise UserError where the precision that was asked for cannot run here.

    Args:
        flags: of the run.
        device: "cuda" or "cpu".
        engine: Transformer Engine is installed.
        capability: of this rank's GPU; None asks torch.
        cuda: the version that torch was built with; None asks torch.
    """
    if "transformer_impl" in flags.named and flags.transformer_impl != "local":
        _need_engine(f"--transformer-impl {flags.transformer_impl}", flags, device, engine)
    _check_orphans(flags)
    if (scaled := scaled_format(flags)) is None:
        return
    text = f"--{scaled.bits}-format {scaled.format} (--{scaled.bits}-recipe {scaled.name})"
    _need_engine(text, flags, device, engine)
    _check_gpu(text, scaled, capability or gpu_capability(), cuda or cuda_version())
    if scaled.name == "delayed" and flags.fp8_param_gather:
        raise UserError(
            "--fp8-param-gather does not go with --fp8-recipe delayed: the imported weights would"
            " be rounded to FP8 with a scale of 1, which loses the small ones. Leave it out, or"
            " choose another recipe"
        )


@dataclass(frozen=True)
class ScaledFormat:
    """The 8-bit or 4-bit numbers that a run computes in: "fp8" or "fp4", --fp8-format's value, the
    recipe's name and the recipe."""

    bits: str
    format: str
    name: str
    recipe: Recipe


def scaled_format(flags: Flags) -> ScaledFormat | None:
    """What the flags ask for; None without FP8 and FP4."""
    if flags.fp8:
        name = flags.fp8_recipe or DEFAULTS["fp8"]
        return ScaledFormat("fp8", flags.fp8, name, FP8[name])
    if flags.fp4:
        name = flags.fp4_recipe or DEFAULTS["fp4"]
        return ScaledFormat("fp4", flags.fp4, name, FP4[name])
    return None


def gpu_capability() -> tuple[int, int]:
    """Of this process' GPU, which Megatron will choose by the same number."""
    return torch.cuda.get_device_capability(int(os.environ.get("LOCAL_RANK", "0")))


def cuda_version() -> tuple[int, int]:
    """Of the CUDA that torch was built with."""
    major, minor = (torch.version.cuda or "0.0").split(".")[:2]
    return int(major), int(minor)


def _need_engine(text: str, flags: Flags, device: str, engine: bool) -> None:
    """Raise UserError where the layers are not Transformer Engine's; `text` is what needs them."""
    if not engine:
        raise UserError(
            f"{text} needs Transformer Engine, which is not installed here: take it from NVIDIA's"
            " PyTorch container or pip install 'megatron-core[te]', or leave the flag out"
        )
    if device == "cpu":
        raise UserError(f"{text} needs a GPU, this run is on the CPU: leave it out")
    if flags.transformer_impl == "local":
        raise UserError(
            f"{text} does nothing in local layers: leave --transformer-impl local out, or train in"
            " bf16 without it"
        )


def _check_orphans(flags: Flags) -> None:
    """Raise UserError for a recipe without its format: Megatron would train without a word in
    another precision."""
    recipes = {"fp8": ("hybrid", flags.fp8, flags.fp8_recipe)}
    recipes["fp4"] = ("e2m1", flags.fp4, flags.fp4_recipe)
    for bits, (example, number_format, recipe) in recipes.items():
        if f"{bits}_recipe" in flags.named and recipe and not number_format:
            raise UserError(
                f"--{bits}-recipe {recipe} does nothing without --{bits}-format: add"
                f" --{bits}-format {example}, or leave it out"
            )


def _check_gpu(
    text: str, scaled: ScaledFormat, capability: tuple[int, int], cuda: tuple[int, int]
) -> None:
    """Raise UserError where the GPU, or its CUDA, lacks what the recipe computes with."""
    recipe = scaled.recipe
    if not recipe.runs_on(capability):
        others = [
            name for name, other in FP8.items() if name != "custom" and other.runs_on(capability)
        ]
        instead = (
            f"pass --fp8-format with --fp8-recipe {' or '.join(others)}"
            if others
            else "train in bf16"
        )
        raise UserError(
            f"{text} runs on {recipe.gpus}, this GPU has compute capability"
            f" {capability[0]}.{capability[1]}: {instead}"
        )
    if cuda < recipe.cuda:
        raise UserError(
            f"{text} needs CUDA {recipe.cuda[0]}.{recipe.cuda[1]}, torch has {cuda[0]}.{cuda[1]}:"
            f" take a newer container, or another --{scaled.bits}-recipe"
        )
