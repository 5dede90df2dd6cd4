"""What a precision asks: Transformer Engine, and a GPU that has its number format.

Megatron's own validation passes FP8 with local layers, without Transformer Engine, and every recipe
on every GPU; what follows is a crash in the first step, or none and bf16 under the name of FP8.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from megatron_tsft.errors import UserError


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
    given: Mapping[str, Any],
    device: str,
    *,
    engine: bool,
    capability: tuple[int, int] | None = None,
    cuda: tuple[int, int] | None = None,
) -> None:
    """Raise UserError where the precision that was asked for cannot run here.

    Args:
        given: the flags on the command line, by destination.
        device: "cuda" or "cpu".
        engine: Transformer Engine is installed.
        capability: of this rank's GPU; None asks torch.
        cuda: the version that torch was built with; None asks torch.
    """
    if given.get("transformer_impl", "local") != "local":
        _need_engine(f"--transformer-impl {given['transformer_impl']}", given, device, engine)
    _check_orphans(given)
    if (found := asked(given)) is not None:
        bits, name, recipe = found
        text = f"--{bits}-format {given[bits]} (--{bits}-recipe {name})"
        _need_engine(text, given, device, engine)
        _check_gpu(text, bits, recipe, capability or gpu_capability(), cuda or cuda_version())
        if name == "delayed" and given.get("fp8_param_gather"):
            raise UserError(
                "--fp8-param-gather does not go with --fp8-recipe delayed: the imported weights"
                " would be rounded to FP8"
                " with a scale of 1, which loses the small ones. Leave it out, or choose another"
                " recipe"
            )


def asked(given: Mapping[str, Any]) -> tuple[str, str, Recipe] | None:
    """("fp8" or "fp4", the recipe's name, the recipe) of the flags; None without either."""
    for bits, table in (("fp8", FP8), ("fp4", FP4)):
        if given.get(bits):
            name = given.get(f"{bits}_recipe") or DEFAULTS[bits]
            return bits, name, table[name]
    return None


def keep_start_weights(args: Any) -> None:
    """Make the fp32 weights of the optimizer out of the checkpoint, where the model itself holds
    FP8 ones.

    args: Megatron's, parsed. With --fp8-param-gather Megatron would make them out of the model's
    FP8 numbers when it loads without an optimizer (training/checkpointing.py, reload_model_params):
    the start weights would be rounded for good. The flag against it has an assertion,
    --no-load-optim, that a run which resumes must not meet; so it is set after the parser. It reads
    the loaded tensors, which are FP8, too, where the loader quantizes as it reads
    (dist_checkpointing/strategies/torch.py, stream_ckpt_dequant). A run that resumes has these
    weights from the optimizer's checkpoint: Megatron then reads neither setting.
    """
    if args.fp8_param_gather or args.fp4_param_gather:
        args.load_main_params_from_ckpt, args.stream_ckpt_dequant = True, False


def gpu_capability() -> tuple[int, int]:
    """Of this process' GPU, which Megatron will choose by the same number."""
    return torch.cuda.get_device_capability(int(os.environ.get("LOCAL_RANK", "0")))


def cuda_version() -> tuple[int, int]:
    """Of the CUDA that torch was built with."""
    major, minor = (torch.version.cuda or "0.0").split(".")[:2]
    return int(major), int(minor)


def _need_engine(text: str, given: Mapping[str, Any], device: str, engine: bool) -> None:
    """Raise UserError where the layers are not Transformer Engine's; `text` is what needs them."""
    if not engine:
        raise UserError(
            f"{text} needs Transformer Engine, which is not installed here: take it from NVIDIA's"
            " PyTorch container or"
            " pip install 'megatron-core[te]', or leave the flag out"
        )
    if device == "cpu":
        raise UserError(f"{text} needs a GPU, this run is on the CPU: leave it out")
    if given.get("transformer_impl") == "local":
        raise UserError(
            f"{text} does nothing in local layers: leave --transformer-impl local out, or train in"
            " bf16 without it"
        )


def _check_orphans(given: Mapping[str, Any]) -> None:
    """Raise UserError for a recipe without its format: Megatron would train without a word in
    another precision."""
    for bits, example in (("fp8", "hybrid"), ("fp4", "e2m1")):
        if given.get(f"{bits}_recipe") and not given.get(bits):
            raise UserError(
                f"--{bits}-recipe {given[f'{bits}_recipe']} does nothing without --{bits}-format:"
                f" add --{bits}-format"
                f" {example}, or leave it out"
            )


def _check_gpu(
    text: str, bits: str, recipe: Recipe, capability: tuple[int, int], cuda: tuple[int, int]
) -> None:
    """Raise UserError where the GPU, or its CUDA, lacks what the recipe computes with."""
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
            " take a newer"
            f" container, or another --{bits}-recipe"
        )
