"""What the loss's arguments must be: every error says what was wrong, with the value, and what to
pass instead."""

import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron_tsft.loss.records import TeacherHidden, TeacherTopK
from megatron_tsft.objectives import Coefficients, Objective, Scalar

if TYPE_CHECKING:
    from megatron_tsft.loss.arguments import Arguments

LOGIT_TYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
DIAGNOSTICS = ("entropy", "kl")


def debugging() -> bool:
    """TSFT_DEBUG=1: checks that synchronise with the device are on."""
    return os.environ.get("TSFT_DEBUG", "0") not in ("", "0")


def check_labels(labels: Tensor, vocab_size: int, ignore_index: int) -> None:
    """Raise ValueError where a label is neither ignored nor in [0, vocab_size). Synchronises."""
    bad = (labels != ignore_index) & ((labels < 0) | (labels >= vocab_size))
    if bool(bad.any()):
        values = sorted(set(labels[bad].tolist()))[:8]
        raise ValueError(
            f"labels {values} are outside [0, {vocab_size}) and are not ignore_index={ignore_index}"
        )


def check_logits(logits: Tensor, labels: Tensor, inplace: bool) -> None:
    """Raise where logits [..., V/tp] are none, do not fit the labels, or cannot be written over."""
    if logits.dtype not in LOGIT_TYPES:
        raise TypeError(
            f"logits are {logits.dtype}: they must be bfloat16, float16, float32 or float64"
        )
    if logits.dim() < 1 or logits.shape[:-1] != labels.shape or logits.shape[-1] == 0:
        raise ValueError(
            f"logits {tuple(logits.shape)} and labels {tuple(labels.shape)} do not fit: logits"
            " must be labels' shape "
            "plus one dimension for the vocabulary shard"
        )
    if inplace and any(
        stride == 0 and size > 1 for stride, size in zip(logits.stride(), logits.shape, strict=True)
    ):
        raise ValueError(
            "inplace=True cannot write over expanded logits: pass inplace=False or"
            " logits.contiguous()"
        )


def check_head(name: str, hidden: Tensor, weight: Tensor, labels: Tensor, ranks: int) -> None:
    """Raise where hidden [..., H] and weight [V/tp, H] are no head for the labels.

    Args:
        name: "" or "TeacherHidden.", for messages.
        ranks: over how many ranks dim 0 of hidden is sharded (sequence parallel), else 1.
    """
    for key, value in ((f"{name}hidden", hidden), (f"{name}weight", weight)):
        if any(kind.__name__ == "DTensor" for kind in type(value).__mro__):
            raise TypeError(
                f"{key} is a DTensor: pass this rank's part, {key.split('.')[-1]}.to_local()"
            )
        if value.dtype not in LOGIT_TYPES:
            raise TypeError(
                f"{key} is {value.dtype}: it must be bfloat16, float16, float32 or float64"
            )
    if hidden.dtype != weight.dtype:
        raise TypeError(
            f"{name}hidden is {hidden.dtype} and {name}weight {weight.dtype}: they must be of one"
            " type, pass"
            f" hidden.to({weight.dtype})"
        )
    _check_device(f"{name}hidden", hidden, weight, f"{name}weight")
    lead = labels.shape
    if ranks > 1:
        if not lead or lead[0] % ranks:
            raise ValueError(
                f"labels {tuple(lead)} do not divide over {ranks} ranks on dim 0"
                " (sequence_parallel)"
            )
        lead = torch.Size([lead[0] // ranks, *lead[1:]])
    if hidden.dim() < 1 or hidden.shape[:-1] != lead:
        raise ValueError(
            f"{name}hidden has shape {tuple(hidden.shape)}: it must be {tuple(lead)}, the labels'"
            " shape"
            f"{', sharded on dim 0,' if ranks > 1 else ''} plus one dimension"
        )
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1] or weight.shape[0] == 0:
        raise ValueError(
            f"{name}weight has shape {tuple(weight.shape)}: it must be [V/tp, {hidden.shape[-1]}]"
        )


def check_tensors(arguments: "Arguments", like: Tensor, width: int, like_name: str) -> None:
    """Raise where a type, a shape or a device is not what the labels and the logits ask for.

    Args:
        arguments: what the loss is asked.
        like: the logits, or the head's weight; messages call it `like_name`.
        width: V/tp.
    """
    labels, teacher, sequence_ids = arguments.labels, arguments.teacher, arguments.sequence_ids
    if labels.dtype != torch.int64:
        raise TypeError(f"labels are {labels.dtype}: they must be int64 token ids")
    shape, expected = labels.shape, f"{tuple(labels.shape)}, the labels' shape"
    wanted: list[tuple[str, Tensor | None, torch.Size, str]] = [
        ("reference_logprobs", arguments.reference_logprobs, shape, expected),
        ("token_weights", arguments.token_weights, shape, expected),
    ]
    if isinstance(teacher, TeacherTopK):
        if teacher.ids.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"TeacherTopK.ids are {teacher.ids.dtype}: they must be int32 or int64")
        if teacher.ids.dim() != labels.dim() + 1 or teacher.ids.shape[:-1] != shape:
            raise ValueError(
                f"TeacherTopK.ids {tuple(teacher.ids.shape)} must be {tuple(shape)} plus one"
                " dimension for k"
            )
        if teacher.tail not in ("uniform", "drop"):
            raise ValueError(f"TeacherTopK.tail={teacher.tail!r}; valid: uniform, drop")
        ids_text = f"{tuple(teacher.ids.shape)}, the ids' shape"
        wanted += [
            ("TeacherTopK.logprobs", teacher.logprobs, teacher.ids.shape, ids_text),
            ("TeacherTopK.label_logprobs", teacher.label_logprobs, shape, expected),
            ("TeacherTopK.tail_logmass", teacher.tail_logmass, shape, expected),
        ]
        _check_device("TeacherTopK.ids", teacher.ids, like, like_name)
    elif isinstance(teacher, TeacherHidden):
        if teacher.weight.shape[0] != width:
            raise ValueError(
                f"TeacherHidden.weight has {len(teacher.weight)} rows: it must have {width}, as"
                " weight"
            )
        _check_device("TeacherHidden.hidden", teacher.hidden, like, like_name)
        _check_device("TeacherHidden.weight", teacher.weight, like, like_name)
        absent = teacher.absent
        if absent is not None:
            if absent.dtype != torch.bool or absent.shape != (width,):
                raise ValueError(
                    f"TeacherHidden.absent is {absent.dtype} {tuple(absent.shape)}: it must be"
                    f" bool ({width},)"
                )
            _check_device("TeacherHidden.absent", absent, like, like_name)
    elif isinstance(teacher, Tensor):
        size = torch.Size([*shape, width])
        wanted.append(("teacher", teacher, size, f"{tuple(size)}, the logits' shape"))
    elif teacher is not None:
        also = ", a TeacherHidden" if like_name == "weight" else ""
        raise TypeError(
            f"teacher is {type(teacher).__name__}: pass a tensor of logits, a TeacherTopK{also} or"
            " None"
        )
    for name, value, size, text in wanted:
        if value is None:
            continue
        if not value.is_floating_point():
            raise TypeError(f"{name} is {value.dtype}: it must be floating-point")
        if value.shape != size:
            raise ValueError(f"{name} has shape {tuple(value.shape)}: it must be {text}")
        _check_device(name, value, like, like_name)
    _check_device("labels", labels, like, like_name)
    if sequence_ids is not None:
        if sequence_ids.dtype != torch.int64:
            raise TypeError(f"sequence_ids are {sequence_ids.dtype}: they must be int64")
        if sequence_ids.shape != shape:
            raise ValueError(
                f"sequence_ids has shape {tuple(sequence_ids.shape)}: it must be {expected}"
            )
        _check_device("sequence_ids", sequence_ids, like, like_name)


def _check_device(name: str, value: Tensor, like: Tensor, like_name: str) -> None:
    if value.device != like.device:
        verb = "are" if like_name == "logits" else "is"
        raise ValueError(
            f"{name} is on {value.device} but the {like_name} {verb} on {like.device}: move it"
            " there"
        )


def check_numbers(
    width: int, world: int, vocab_size: int, logit_scale: float, diagnostics: Sequence[str]
) -> None:
    """Raise ValueError for a number or name that is out of range."""
    if not 0 < vocab_size <= width * world:
        raise ValueError(
            f"vocab_size={vocab_size} does not fit {world} shard(s) of {width} columns: pass"
            f" 1..{width * world}"
        )
    if not math.isfinite(logit_scale) or logit_scale == 0:
        raise ValueError(f"logit_scale={logit_scale!r} must be a non-zero, finite number")
    for name in diagnostics:
        if name not in DIAGNOSTICS:
            raise ValueError(f"unknown diagnostic {name!r}; valid: {', '.join(DIAGNOSTICS)}")


def check_combination(arguments: "Arguments", objective: Objective, plan: Coefficients) -> None:
    """Raise ValueError where an objective lacks what it needs, or is given what it would ignore."""
    name, teacher, cp_group = objective.name, arguments.teacher, arguments.cp_group
    reference_logprobs, token_weights = arguments.reference_logprobs, arguments.token_weights
    reads_reference = bool(objective.needs & {"reference_logp_y", "sequence_log_ratio"})
    if teacher is None:
        if objective.teacher == "required":
            raise ValueError(
                f"objective {name!r} needs a teacher and none was given: pass teacher="
            )
        if objective.teacher == "optional" and _may_be_nonzero(plan.b):
            raise ValueError(
                f"objective {objective!r} needs a teacher and none was given: pass teacher=, or"
                " make the "
                "teacher's share zero (for target-sft: eta=0)"
            )
        if reads_reference and reference_logprobs is None:
            raise ValueError(
                f"objective {name!r} needs log p_ref(y): pass reference_logprobs= or a teacher"
            )
    elif objective.teacher == "none" and not (reads_reference and reference_logprobs is None):
        raise ValueError(
            f"objective {name!r} ignores the teacher that was given: leave teacher out"
        )
    elif (
        isinstance(teacher, TeacherTopK)
        and reads_reference
        and reference_logprobs is None
        and teacher.label_logprobs is None
    ):
        raise ValueError(
            f"objective {name!r} needs log p_ref(y): pass reference_logprobs= or"
            " TeacherTopK.label_logprobs"
        )
    if reference_logprobs is not None and not reads_reference:
        raise ValueError(
            f"objective {name!r} ignores the reference_logprobs that were given: leave them out"
        )
    if objective.requires_token_weights and token_weights is None:
        raise ValueError(
            f"objective {name!r} needs token_weights (1 on critical tokens, 0 elsewhere) and none"
            " were given"
        )
    if "sequence_log_ratio" in objective.needs:
        if arguments.sequence_ids is None:
            raise ValueError(f"objective {name!r} averages over sequences: pass sequence_ids=")
        if arguments.num_sequences is None and cp_group is not None and cp_group.size() > 1:
            raise ValueError(
                f"objective {name!r} under context parallelism needs num_sequences=, the same on"
                " every rank"
            )


def _may_be_nonzero(value: Scalar) -> bool:
    if isinstance(value, Tensor):
        return value.device.type != "cpu" or bool((value != 0).any())
    return value != 0
