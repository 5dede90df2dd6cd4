"""Do Megatron and transformers compute the same from their folders? Layer by layer and at the
logits, fp32 on CPU."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_tsft.checkpoint.card import ModelCard
from megatron_tsft.checkpoint.folder import latest_checkpoint
from megatron_tsft.checkpoint.keys import compare_keys
from megatron_tsft.checkpoint.megatron_model import (
    ONE_RANK,
    Layout,
    build_model,
    cpu_ranks,
    forward,
    load_weights,
)
from megatron_tsft.checkpoint.units import expected_keys
from megatron_tsft.trust import trusted

Observe = Callable[[int, torch.Tensor], None]  # (layer from 0, its output [b, s, h])


@dataclass(frozen=True)
class LogitDifference:
    """How far two models' outputs are apart.

    Attributes:
        max_difference: largest |Megatron - Hugging Face|.
        max_logit: largest |logit|, for scale.
        argmax_agreement: share of positions with the same most probable token.
        positions: how many were compared.
        layers: the largest difference of each layer's output, divided by max(1, its largest
            number); empty where only logits were compared.
    """

    max_difference: float
    max_logit: float
    argmax_agreement: float
    positions: int
    layers: tuple[float, ...] = ()


def compare_logits(
    hf_dir: Path | str,
    megatron_dir: Path | str,
    input_ids: torch.Tensor,
    *,
    iteration: int | None = None,
    rounded_to: torch.dtype | None = None,
) -> LogitDifference:
    """Compare a checkpoint of `megatron_dir` with `hf_dir` at input_ids [b, s] int64, one model
    after the other.

    iteration: None takes the latest. rounded_to: what Megatron's weights are rounded to first.
    """
    outputs: list[torch.Tensor] = []
    layers: list[float] = []

    def compare(layer: int, ours: torch.Tensor) -> None:
        theirs = outputs[layer]
        layers.append((ours - theirs).abs().max().item() / max(1.0, theirs.abs().max().item()))

    theirs = hf_logits(hf_dir, input_ids, observe=lambda _, output: outputs.append(output))
    ours = megatron_logits(
        megatron_dir, input_ids, iteration=iteration, rounded_to=rounded_to, observe=compare
    )
    return difference(ours, theirs, tuple(layers))


def difference(
    ours: torch.Tensor, theirs: torch.Tensor, layers: tuple[float, ...] = ()
) -> LogitDifference:
    """Of Megatron's and Hugging Face's logits, both [b, s, vocab_size]."""
    return LogitDifference(
        max_difference=(ours - theirs).abs().max().item(),
        max_logit=theirs.abs().max().item(),
        argmax_agreement=(ours.argmax(-1) == theirs.argmax(-1)).float().mean().item(),
        positions=ours.shape[:-1].numel(),
        layers=layers,
    )


def hf_logits(
    hf_dir: Path | str, input_ids: torch.Tensor, *, observe: Observe | None = None
) -> torch.Tensor:
    """Logits [b, s, vocab_size] of transformers in fp32; `observe` sees each layer's output."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    # eager: the attention that Megatron's local layers
    # compute, so that no kernel's rounding hides a difference
    load = AutoModelForCausalLM.from_pretrained
    plain = {"attn_implementation": "eager", "experts_implementation": "eager"}
    logging.disable_progress_bar()  # of seconds, among ours
    try:
        model: Any = load(
            str(hf_dir),
            dtype=torch.float32,
            **plain,
            local_files_only=True,
            trust_remote_code=trusted(),
        )
    finally:
        logging.enable_progress_bar()
    model.eval()
    if observe:
        _watch(model.model.layers, observe)
    with torch.no_grad():
        return model(input_ids=input_ids, use_cache=False).logits.float()


def megatron_logits(
    megatron_dir: Path | str,
    input_ids: torch.Tensor,
    layout: Layout = ONE_RANK,
    *,
    iteration: int | None = None,
    rope_scaling: bool = True,
    dtype: torch.dtype = torch.float32,
    rounded_to: torch.dtype | None = None,
    observe: Observe | None = None,
) -> torch.Tensor:
    """Logits [b, s, vocab_size] of a checkpoint, computed in `dtype`.

    In a process group every rank calls this with the layout of all ranks and gets all logits.
    rope_scaling False leaves the card's scaling out. `observe` sees the output of every layer on
    this rank.

    Raises:
        UserError: no card, no complete checkpoint, or one that does not fit the card.
    """
    card, checkpoint = ModelCard.load(megatron_dir), latest_checkpoint(megatron_dir, iteration)
    compare_keys(expected_keys(card), checkpoint)
    with cpu_ranks(layout), torch.no_grad():
        model = build_model(card, layout, rope_scaling=rope_scaling, dtype=dtype)
        load_weights(model, checkpoint)
        if rounded_to is not None:
            for parameter in model.parameters():
                parameter.copy_(parameter.to(rounded_to))
        if observe:
            _watch(
                model.decoder.layers, lambda layer, output: observe(layer, output.transpose(0, 1))
            )
        return forward(model, input_ids)[..., : card.vocab_size]


def _watch(layers: Any, observe: Observe) -> None:
    """Call `observe` with each layer's output, the first of several where it returns a tuple."""
    for number, layer in enumerate(layers):

        def hook(_module: Any, _inputs: Any, output: Any, number: int = number) -> None:
            observe(number, output[0] if isinstance(output, tuple) else output)

        layer.register_forward_hook(hook)
