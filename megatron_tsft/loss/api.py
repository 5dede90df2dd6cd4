"""`q_target_cross_entropy`: the public function. It checks every input, flattens to N tokens and calls the loss."""

import math
import os
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tsft.loss.records import QTargetOutput, TeacherTopK
from megatron_tsft.loss.statistics import Shard
from megatron_tsft.loss.teacher import DenseTeacher, SparseTeacher, sparse_teacher
from megatron_tsft.loss.vocab_parallel import Problem, vocab_parallel_q_target
from megatron_tsft.objectives import Coefficients, Objective, Scalar, as_like

LOGIT_TYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
DIAGNOSTICS = ("entropy", "kl")


def q_target_cross_entropy(
    logits: Tensor,  # [..., V/tp]
    labels: Tensor,  # [...] int64, global ids
    objective: Objective,
    teacher: Tensor | TeacherTopK | None = None,
    reference_logprobs: Tensor | None = None,  # [...]
    token_weights: Tensor | None = None,  # [...]
    sequence_ids: Tensor | None = None,  # [...] int64
    num_sequences: int | None = None,
    logit_scale: float = 1.0,
    diagnostics: Sequence[str] = (),
    tp_group: "dist.ProcessGroup | None" = None,
    cp_group: "dist.ProcessGroup | None" = None,
    vocab_size: int | None = None,
    ignore_index: int = -100,
    inplace: bool = False,
) -> QTargetOutput:
    """The loss that drives softmax(logits) towards an objective's target Q, per token (arXiv 2606.11189).

    Two collectives over `tp_group` forward (eaft three; iw-sft one more over `cp_group`), none backward; fp32 inside
    (fp64 for fp64 logits); no host synchronisation if `num_sequences` is given with `sequence_ids`.

    Args:
        logits: [..., V/tp] this rank's shard, bf16, fp16, fp32 or fp64; shards are equal and in rank order.
        labels: [...] int64 global ids; `ignore_index` gives exactly zero loss and gradient.
        objective: from `objectives.get` or `objectives.mixture`.
        teacher: [..., V/tp] logits or log-probs of T, sharded alike, or a `TeacherTopK`.
        reference_logprobs: [...] log p_ref(y) for iw-sft and proximal; else taken from the teacher.
        token_weights: [...] floating, multiplies c_y and c_r.
        sequence_ids: [...] int64 in [0, num_sequences), global over CP (iw-sft).
        num_sequences: how many sequences there are; without it the largest id is read from the device.
        logit_scale: z = logit_scale * logits; it never touches the teacher.
        diagnostics: any of "entropy" and "kl".
        tp_group, cp_group: process groups; None means not sharded.
        vocab_size: the true vocabulary; columns at or beyond it are padding. None means all columns.
        ignore_index: the label of unsupervised tokens.
        inplace: write the gradient over the logits (they are lost; the caller must not use them again).

    Returns:
        QTargetOutput: per-token [...] values; `loss` is differentiable in `logits`.

    Raises:
        ValueError, TypeError: a shape, dtype, device or combination that cannot be right, with what to change. With
            TSFT_DEBUG=1 in the environment also labels outside the vocabulary and teacher rows that are not finite.
    """
    shape, world = labels.shape, 1 if tp_group is None else tp_group.size()
    _check_tensors(logits, labels, teacher, reference_logprobs, token_weights, sequence_ids)
    width = logits.shape[-1]
    vocab_size = width * world if vocab_size is None else int(vocab_size)
    if not 0 < vocab_size <= width * world:
        raise ValueError(
            f"vocab_size={vocab_size} does not fit {world} shard(s) of {width} columns: pass 1..{width * world}"
        )
    if not math.isfinite(logit_scale) or logit_scale == 0:
        raise ValueError(f"logit_scale={logit_scale!r} must be a non-zero, finite number")
    for name in diagnostics:
        if name not in DIAGNOSTICS:
            raise ValueError(f"unknown diagnostic {name!r}; valid: {', '.join(DIAGNOSTICS)}")
    objective = objective.flatten(shape)
    plan = objective.residual_plan(logits.device)
    _check_combination(
        objective, plan, teacher, reference_logprobs, token_weights, sequence_ids, num_sequences, cp_group
    )

    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    flat = labels.reshape(-1)
    labelled = flat != ignore_index
    rank = 0 if tp_group is None else tp_group.rank()
    offset = rank * width
    columns = min(max(vocab_size - offset, 0), width)
    local = flat - offset
    owns = labelled & (local >= 0) & (local < columns)

    def vector(value: Tensor | None) -> Tensor | None:
        return None if value is None else value.reshape(-1).to(dtype).detach()

    view: DenseTeacher | SparseTeacher | None = None
    if isinstance(teacher, TeacherTopK):
        size = (flat.numel(), teacher.ids.shape[-1])
        flat_teacher = TeacherTopK(
            teacher.ids.reshape(size),
            teacher.logprobs.reshape(size).detach(),
            teacher.tail,
            vector(teacher.label_logprobs),
            vector(teacher.tail_logmass),
        )
        view = sparse_teacher(flat_teacher, flat, offset=offset, columns=columns, vocab_size=vocab_size, dtype=dtype)
        if reference_logprobs is None and objective.needs & {"reference_logp_y", "sequence_log_ratio"}:
            reference_logprobs = teacher.label_logprobs
    elif teacher is not None:
        view = DenseTeacher(teacher.detach().reshape(-1, width), columns)

    def number(value: Scalar) -> Scalar:
        return as_like(value, logits.new_empty(0, dtype=dtype)) if isinstance(value, Tensor) else float(value)

    if sequence_ids is not None and num_sequences is None:
        num_sequences = int(sequence_ids.max()) + 1 if sequence_ids.numel() else 0
    problem = Problem(
        shard=Shard(
            logits=logits.reshape(-1, width),
            columns=columns,
            scale=float(logit_scale),
            label=local.clamp(0, max(columns - 1, 0)),
            owns_label=owns,
            a=number(plan.a),
            b=number(plan.b),
            teacher=view,
        ),
        labels=flat,
        labelled=labelled,
        objective=objective,
        plan=plan,
        vocab_size=vocab_size,
        reference_logprobs=vector(reference_logprobs),
        token_weights=vector(token_weights),
        sequence_ids=None if sequence_ids is None else sequence_ids.reshape(-1),
        num_sequences=num_sequences or 0,
        diagnostics=frozenset(diagnostics),
        tp_group=tp_group,
        cp_group=cp_group,
        inplace=inplace,
    )
    if not debugging():
        return vocab_parallel_q_target(problem, shape)
    check_labels(labels, vocab_size, ignore_index)
    out = vocab_parallel_q_target(problem, shape)
    if int(out.bad_teacher_rows):
        where = torch.nonzero(labelled & ~out.supervised.reshape(-1))[:8, 0].tolist()
        raise ValueError(f"{int(out.bad_teacher_rows)} teacher rows are not finite, at flat token positions {where}")
    return out


def debugging() -> bool:
    """TSFT_DEBUG=1: checks that synchronise with the device are on."""
    return os.environ.get("TSFT_DEBUG", "0") not in ("", "0")


def check_labels(labels: Tensor, vocab_size: int, ignore_index: int) -> None:
    """Raise ValueError where a label is neither ignored nor in [0, vocab_size). Synchronises."""
    bad = (labels != ignore_index) & ((labels < 0) | (labels >= vocab_size))
    if bool(bad.any()):
        values = sorted(set(labels[bad].tolist()))[:8]
        raise ValueError(f"labels {values} are outside [0, {vocab_size}) and are not ignore_index={ignore_index}")


def _check_tensors(
    logits: Tensor,
    labels: Tensor,
    teacher: Tensor | TeacherTopK | None,
    reference_logprobs: Tensor | None,
    token_weights: Tensor | None,
    sequence_ids: Tensor | None,
) -> None:
    if logits.dtype not in LOGIT_TYPES:
        raise TypeError(f"logits are {logits.dtype}: they must be bfloat16, float16, float32 or float64")
    if labels.dtype != torch.int64:
        raise TypeError(f"labels are {labels.dtype}: they must be int64 token ids")
    if logits.dim() < 1 or logits.shape[:-1] != labels.shape or logits.shape[-1] == 0:
        raise ValueError(
            f"logits {tuple(logits.shape)} and labels {tuple(labels.shape)} do not fit: logits must be labels' shape "
            "plus one dimension for the vocabulary shard"
        )
    shape, expected = labels.shape, f"{tuple(labels.shape)}, the labels' shape"
    wanted: list[tuple[str, Tensor | None, torch.Size, str]] = [
        ("reference_logprobs", reference_logprobs, shape, expected),
        ("token_weights", token_weights, shape, expected),
    ]
    if isinstance(teacher, TeacherTopK):
        if teacher.ids.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"TeacherTopK.ids are {teacher.ids.dtype}: they must be int32 or int64")
        if teacher.ids.dim() != labels.dim() + 1 or teacher.ids.shape[:-1] != shape:
            raise ValueError(
                f"TeacherTopK.ids {tuple(teacher.ids.shape)} must be {tuple(shape)} plus one dimension for k"
            )
        if teacher.tail not in ("uniform", "drop"):
            raise ValueError(f"TeacherTopK.tail={teacher.tail!r}; valid: uniform, drop")
        wanted += [
            (
                "TeacherTopK.logprobs",
                teacher.logprobs,
                teacher.ids.shape,
                f"{tuple(teacher.ids.shape)}, the ids' shape",
            ),
            ("TeacherTopK.label_logprobs", teacher.label_logprobs, shape, expected),
            ("TeacherTopK.tail_logmass", teacher.tail_logmass, shape, expected),
        ]
        _check_device("TeacherTopK.ids", teacher.ids, logits)
    elif isinstance(teacher, Tensor):
        wanted.append(("teacher", teacher, logits.shape, f"{tuple(logits.shape)}, the logits' shape"))
    elif teacher is not None:
        raise TypeError(f"teacher is {type(teacher).__name__}: pass a tensor of logits, a TeacherTopK or None")
    for name, value, size, text in wanted:
        if value is None:
            continue
        if not value.is_floating_point():
            raise TypeError(f"{name} is {value.dtype}: it must be floating-point")
        if value.shape != size:
            raise ValueError(f"{name} has shape {tuple(value.shape)}: it must be {text}")
        _check_device(name, value, logits)
    _check_device("labels", labels, logits)
    if sequence_ids is not None:
        if sequence_ids.dtype != torch.int64:
            raise TypeError(f"sequence_ids are {sequence_ids.dtype}: they must be int64")
        if sequence_ids.shape != shape:
            raise ValueError(f"sequence_ids has shape {tuple(sequence_ids.shape)}: it must be {expected}")
        _check_device("sequence_ids", sequence_ids, logits)


def _check_device(name: str, value: Tensor, logits: Tensor) -> None:
    if value.device != logits.device:
        raise ValueError(f"{name} is on {value.device} but the logits are on {logits.device}: move it there")


def _check_combination(
    objective: Objective,
    plan: Coefficients,
    teacher: Tensor | TeacherTopK | None,
    reference_logprobs: Tensor | None,
    token_weights: Tensor | None,
    sequence_ids: Tensor | None,
    num_sequences: int | None,
    cp_group: "dist.ProcessGroup | None",
) -> None:
    name = objective.name
    reads_reference = bool(objective.needs & {"reference_logp_y", "sequence_log_ratio"})
    if teacher is None:
        if objective.teacher == "required":
            raise ValueError(f"objective {name!r} needs a teacher and none was given: pass teacher=")
        if objective.teacher == "optional" and _may_be_nonzero(plan.b):
            raise ValueError(
                f"objective {objective!r} needs a teacher and none was given: pass teacher=, or make the "
                "teacher's share zero (for target-sft: eta=0)"
            )
        if reads_reference and reference_logprobs is None:
            raise ValueError(f"objective {name!r} needs log p_ref(y): pass reference_logprobs= or a teacher")
    elif objective.teacher == "none" and not (reads_reference and reference_logprobs is None):
        raise ValueError(f"objective {name!r} ignores the teacher that was given: leave teacher out")
    elif (
        isinstance(teacher, TeacherTopK)
        and reads_reference
        and reference_logprobs is None
        and teacher.label_logprobs is None
    ):
        raise ValueError(
            f"objective {name!r} needs log p_ref(y): pass reference_logprobs= or TeacherTopK.label_logprobs"
        )
    if reference_logprobs is not None and not reads_reference:
        raise ValueError(f"objective {name!r} ignores the reference_logprobs that were given: leave them out")
    if objective.requires_token_weights and token_weights is None:
        raise ValueError(
            f"objective {name!r} needs token_weights (1 on critical tokens, 0 elsewhere) and none were given"
        )
    if "sequence_log_ratio" in objective.needs:
        if sequence_ids is None:
            raise ValueError(f"objective {name!r} averages over sequences: pass sequence_ids=")
        if num_sequences is None and cp_group is not None and cp_group.size() > 1:
            raise ValueError(
                f"objective {name!r} under context parallelism needs num_sequences=, the same on every rank"
            )


def _may_be_nonzero(value: Scalar) -> bool:
    if isinstance(value, Tensor):
        return value.device.type != "cpu" or bool((value != 0).any())
    return value != 0
