"""What the loss's arguments must be: an error says what was wrong and what to pass instead."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tsft.loss.records import QTargetOutput, TeacherHidden, TeacherTopK
from megatron_tsft.objectives import Objective, Residual, Scalar
from megatron_tsft.objectives.definition import READ_A_REFERENCE

LOGIT_TYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
# the values of the output that are None unless asked for
DIAGNOSTICS = tuple(field.name for field in fields(QTargetOutput) if field.default is None)


def debugging() -> bool:
    """TSFT_DEBUG=1: checks that synchronise with the device are on."""
    return os.environ.get("TSFT_DEBUG", "0") not in ("", "0")


def check_label_values(labels: Tensor, vocab_size: int, ignore_index: int) -> None:
    """Raise ValueError where a label is neither ignored nor in [0, vocab_size). Synchronises."""
    outside = (labels != ignore_index) & ((labels < 0) | (labels >= vocab_size))
    if bool(outside.any()):
        strays: Any = labels[outside]
        values = sorted(set(strays.tolist()))[:8]
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
            f"logits {tuple(logits.shape)} and labels {tuple(labels.shape)} do not fit: logits must"
            " be labels' shape plus one dimension for the vocabulary shard"
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
            f" type, pass hidden.to({weight.dtype})"
        )
    lead = labels.shape
    Place(lead, weight.device, f"{name}weight").check_device(f"{name}hidden", hidden)
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


@dataclass(frozen=True)
class Place:
    """Where per-token tensors must lie: of the labels' shape, on the device of the logits.

    Attributes:
        shape: the labels'.
        device: of the logits, or of the head's weight.
        name: what messages call the tensor that has this device.
    """

    shape: torch.Size
    device: torch.device
    name: str

    @property
    def _labels_shape(self) -> str:
        return f"{tuple(self.shape)}, the labels' shape"

    def check_device(self, name: str, value: Tensor) -> None:
        """Raise ValueError where `value` lies on another device."""
        if value.device != self.device:
            verb = "are" if self.name == "logits" else "is"
            raise ValueError(
                f"{name} is on {value.device} but the {self.name} {verb} on {self.device}: move it"
                " there"
            )

    def check_labels(self, labels: Tensor) -> None:
        """Raise TypeError or ValueError where labels are no ids, or lie elsewhere."""
        if labels.dtype != torch.int64:
            raise TypeError(f"labels are {labels.dtype}: they must be int64 token ids")
        self.check_device("labels", labels)

    def check_sequence_ids(self, sequence_ids: Tensor | None) -> None:
        """Raise TypeError or ValueError where sequence ids are no int64 of the labels' shape."""
        if sequence_ids is None:
            return
        if sequence_ids.dtype != torch.int64:
            raise TypeError(f"sequence_ids are {sequence_ids.dtype}: they must be int64")
        if sequence_ids.shape != self.shape:
            raise ValueError(
                f"sequence_ids has shape {tuple(sequence_ids.shape)}: it must be"
                f" {self._labels_shape}"
            )
        self.check_device("sequence_ids", sequence_ids)

    def check_values(
        self,
        name: str,
        value: Tensor | None,
        shape: torch.Size | None = None,
        shape_text: str | None = None,
    ) -> None:
        """Raise TypeError or ValueError where a tensor, if there is one, is not floating-point of a
        shape (None: the labels')."""
        if value is None:
            return
        if not value.is_floating_point():
            raise TypeError(f"{name} is {value.dtype}: it must be floating-point")
        if value.shape != (self.shape if shape is None else shape):
            expected = self._labels_shape if shape_text is None else shape_text
            raise ValueError(f"{name} has shape {tuple(value.shape)}: it must be {expected}")
        self.check_device(name, value)

    def check_teacher(
        self, teacher: Tensor | TeacherTopK | TeacherHidden | None, width: int
    ) -> None:
        """Raise TypeError or ValueError where a teacher does not fit the labels and the columns."""
        if isinstance(teacher, TeacherTopK):
            self._check_top_k(teacher)
        elif isinstance(teacher, TeacherHidden):
            self._check_hidden(teacher, width)
        elif isinstance(teacher, Tensor):
            size = torch.Size([*self.shape, width])
            self.check_values("teacher", teacher, size, f"{tuple(size)}, the logits' shape")
        elif teacher is not None:  # what a type checker would not let pass
            also = ", a TeacherHidden" if self.name == "weight" else ""
            raise TypeError(
                f"teacher is {type(teacher).__name__}: pass a tensor of logits, a"
                f" TeacherTopK{also} or None"
            )

    def _check_top_k(self, teacher: TeacherTopK) -> None:
        ids = teacher.ids
        if ids.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"TeacherTopK.ids are {ids.dtype}: they must be int32 or int64")
        if ids.dim() != len(self.shape) + 1 or ids.shape[:-1] != self.shape:
            raise ValueError(
                f"TeacherTopK.ids {tuple(ids.shape)} must be {tuple(self.shape)} plus one"
                " dimension for k"
            )
        if teacher.tail not in ("uniform", "drop"):
            raise ValueError(f"TeacherTopK.tail={teacher.tail!r}; valid: uniform, drop")
        self.check_device("TeacherTopK.ids", ids)
        ids_text = f"{tuple(ids.shape)}, the ids' shape"
        self.check_values("TeacherTopK.logprobs", teacher.logprobs, ids.shape, ids_text)
        self.check_values("TeacherTopK.label_logprobs", teacher.label_logprobs)
        self.check_values("TeacherTopK.tail_logmass", teacher.tail_logmass)

    def _check_hidden(self, teacher: TeacherHidden, width: int) -> None:
        if teacher.weight.shape[0] != width:
            raise ValueError(
                f"TeacherHidden.weight has {len(teacher.weight)} rows: it must have {width}, as"
                " weight"
            )
        self.check_device("TeacherHidden.hidden", teacher.hidden)
        self.check_device("TeacherHidden.weight", teacher.weight)
        absent = teacher.absent
        if absent is not None:
            if absent.dtype != torch.bool or absent.shape != (width,):
                raise ValueError(
                    f"TeacherHidden.absent is {absent.dtype} {tuple(absent.shape)}: it must be"
                    f" bool ({width},)"
                )
            self.check_device("TeacherHidden.absent", absent)


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


def check_teacher_use(
    objective: Objective,
    residual: Residual,
    teacher: Tensor | TeacherTopK | TeacherHidden | None,
    reference_logprobs: Tensor | None,
) -> None:
    """Raise ValueError where an objective lacks a teacher or reference, or would ignore one."""
    name, reads_reference = objective.name, bool(objective.needs & READ_A_REFERENCE)
    if teacher is None:
        if objective.teacher == "required":
            raise ValueError(
                f"objective {name!r} needs a teacher and none was given: pass teacher="
            )
        if objective.teacher == "optional" and _may_be_nonzero(residual.b):
            raise ValueError(
                f"objective {objective!r} needs a teacher and none was given: pass teacher=, or"
                " make the teacher's share zero (for target-sft: eta=0)"
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


def check_weights(objective: Objective, token_weights: Tensor | None) -> None:
    """Raise ValueError where an objective means nothing without the weights that are missing."""
    if objective.requires_token_weights and token_weights is None:
        raise ValueError(
            f"objective {objective.name!r} needs token_weights (1 on critical tokens, 0 elsewhere)"
            " and none were given"
        )


def check_sequences(
    objective: Objective,
    sequence_ids: Tensor | None,
    num_sequences: int | None,
    cp_group: "dist.ProcessGroup | None",
) -> None:
    """Raise ValueError where an objective averages over sequences that it is not told."""
    if "sequence_log_ratio" in objective.needs:
        if sequence_ids is None:
            raise ValueError(
                f"objective {objective.name!r} averages over sequences: pass sequence_ids="
            )
        if num_sequences is None and cp_group is not None and cp_group.size() > 1:
            raise ValueError(
                f"objective {objective.name!r} under context parallelism needs num_sequences=, the"
                " same on every rank"
            )


def _may_be_nonzero(value: Scalar) -> bool:
    if isinstance(value, Tensor):
        return value.device.type != "cpu" or bool((value != 0).any())
    return value != 0
