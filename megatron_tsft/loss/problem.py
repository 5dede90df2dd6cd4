"""One call of a loss: its options, checked and flattened to N tokens for everything below."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tsft.loss import checks
from megatron_tsft.loss.records import QTargetOutput, TeacherHidden, TeacherTopK
from megatron_tsft.loss.shard import Shard
from megatron_tsft.loss.statistics import Selection
from megatron_tsft.loss.teacher import DenseTeacher, HiddenTeacher, SparseTeacher, sparse_teacher
from megatron_tsft.objectives import Objective, Residual, Scalar, as_like
from megatron_tsft.objectives.definition import READ_A_REFERENCE


class LossOptions(TypedDict, total=False):
    """The keywords that `q_target_cross_entropy` and `q_target_linear_cross_entropy` share.

    Attributes:
        reference_logprobs: [...] log p_ref(y) for iw-sft and proximal; else taken from the teacher.
        token_weights: [...] floating, multiplies c_y and c_r.
        sequence_ids: [...] int64 in [0, num_sequences), global over CP (iw-sft).
        num_sequences: how many sequences there are; without it the largest id is read from the
            device.
        logit_scale: z = logit_scale * logits; it never touches the teacher.
        diagnostics: any of "entropy" and "kl".
        tp_group, cp_group: process groups; None means not sharded.
        vocab_size: the true vocabulary; columns at or beyond it are padding. None means all
            columns.
        ignore_index: the label of unsupervised tokens, which get exactly zero loss and gradient.
    """

    reference_logprobs: Tensor | None
    token_weights: Tensor | None
    sequence_ids: Tensor | None
    num_sequences: int | None
    logit_scale: float
    diagnostics: Sequence[str]
    tp_group: "dist.ProcessGroup | None"
    cp_group: "dist.ProcessGroup | None"
    vocab_size: int | None
    ignore_index: int


@dataclass(frozen=True)
class Problem:
    """One call, checked and flattened to N tokens; this rank's columns begin at `offset`."""

    labels: Tensor  # [N] int64
    labelled: Tensor  # [N] bool: not ignored
    objective: Objective
    residual: Residual  # a and b in the working type
    scale: float  # z = scale * logits
    vocab_size: int
    offset: int
    teacher: DenseTeacher | SparseTeacher | HiddenTeacher | None
    reference_logprobs: Tensor | None  # [N]
    token_weights: Tensor | None  # [N]
    sequence_ids: Tensor | None  # [N] int64
    num_sequences: int
    diagnostics: frozenset[str]
    tp_group: "dist.ProcessGroup | None"
    cp_group: "dist.ProcessGroup | None"

    @property
    def a(self) -> Scalar:
        """Of pi = softmax(a * z + b * log T)."""
        return self.residual.a

    @property
    def b(self) -> Scalar:
        """Of pi = softmax(a * z + b * log T)."""
        return self.residual.b

    def shard(self, logits: Tensor, start: int = 0) -> Shard:
        """Columns [start, start + w) of this rank's, `logits` [N, w], with the teacher on them."""
        first, width = self.offset + start, logits.shape[1]
        if isinstance(self.teacher, SparseTeacher):
            teacher = self.teacher.counted_from(first)
        else:
            teacher = None if self.teacher is None else self.teacher.view(start, width)
        columns = min(max(self.vocab_size - first, 0), width)
        label = self.labels - first
        here = self.labelled & (label >= 0) & (label < columns)
        label = torch.where(here, label, -1)
        return Shard(
            start, logits, columns, self.scale, label, self.labelled, self.a, self.b, teacher
        )

    @property
    def residual_is_p(self) -> bool:
        """pi = p, known on the host: its cross-entropy is H(p), and it leaves the gradient."""
        return (
            self.residual.exists
            and not isinstance(self.a, Tensor)
            and not isinstance(self.b, Tensor)
            and (self.a, self.b) == (1, 0)
        )

    @property
    def has_pi(self) -> bool:
        """There is a residual with statistics of its own."""
        return self.residual.exists and not self.residual_is_p

    @property
    def selection(self) -> Selection:
        """The statistics that this objective and these diagnostics need."""
        needs = set(self.objective.needs | self.diagnostics)
        if self.residual_is_p:
            needs.add("entropy")
        if self.reference_logprobs is None and needs & READ_A_REFERENCE:
            needs.add("teacher_logp_y")  # the reference is T
        return Selection.of(
            needs,
            has_pi=self.has_pi,
            kl="kl" in self.diagnostics,
            dense_teacher=isinstance(self.teacher, DenseTeacher | HiddenTeacher),
            top_k=max(self.objective.top_ks, default=0),
        )


def make_problem(
    labels: Tensor,
    objective: Objective,
    teacher: Tensor | TeacherTopK | TeacherHidden | None,
    options: LossOptions,
    like: Tensor,
    width: int,
    like_name: str = "logits",
) -> Problem:
    """Check everything and flatten it to N tokens.

    Args:
        labels: [...] int64.
        objective: for tokens of the labels' shape.
        teacher: logits [..., V/tp], a top-k, hidden states, or None.
        options: those that are missing have the public losses' defaults.
        like: the logits or the head's weight: device and type.
        width: V/tp.
        like_name: what messages call `like`.

    Raises:
        ValueError, TypeError: what cannot be right, with what to change.
    """
    reference_logprobs, token_weights = (
        options.get("reference_logprobs"),
        options.get("token_weights"),
    )
    sequence_ids, num_sequences = options.get("sequence_ids"), options.get("num_sequences")
    tp_group, cp_group = options.get("tp_group"), options.get("cp_group")
    vocab_size, ignore_index = options.get("vocab_size"), options.get("ignore_index", -100)
    logit_scale, diagnostics = options.get("logit_scale", 1.0), options.get("diagnostics", ())

    place = checks.Place(labels.shape, like.device, like_name)
    place.check_labels(labels)
    place.check_teacher(teacher, width)
    place.check_values("reference_logprobs", reference_logprobs)
    place.check_values("token_weights", token_weights)
    place.check_sequence_ids(sequence_ids)
    world = ranks(tp_group)
    if vocab_size is None:
        vocab_size = width * world
    checks.check_numbers(width, world, vocab_size, logit_scale, diagnostics)
    objective = objective.flatten(labels.shape)
    residual = objective.residual(like.device)
    checks.check_teacher_use(objective, residual, teacher, reference_logprobs)
    checks.check_weights(objective, token_weights)
    checks.check_sequences(objective, sequence_ids, num_sequences, cp_group)
    if checks.debugging():
        checks.check_label_values(labels, vocab_size, ignore_index)

    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    if reference_logprobs is None and isinstance(teacher, TeacherTopK):
        if objective.needs & READ_A_REFERENCE:
            reference_logprobs = teacher.label_logprobs

    def vector(value: Tensor | None) -> Tensor | None:
        return None if value is None else value.reshape(-1).to(dtype).detach()

    def number(value: Scalar) -> Scalar:
        if isinstance(value, Tensor):
            return as_like(value, like.new_empty(0, dtype=dtype))
        return float(value)

    if num_sequences is None:
        num_sequences = 0
        if sequence_ids is not None and sequence_ids.numel():
            num_sequences = int(sequence_ids.max()) + 1
    flat_labels = labels.reshape(-1)
    return Problem(
        labels=flat_labels,
        labelled=flat_labels != ignore_index,
        objective=objective,
        residual=Residual(residual.exists, number(residual.a), number(residual.b)),
        scale=float(logit_scale),
        vocab_size=int(vocab_size),
        offset=0 if tp_group is None else tp_group.rank() * width,
        teacher=_flatten_teacher(teacher, labels, width, int(vocab_size), dtype),
        reference_logprobs=vector(reference_logprobs),
        token_weights=vector(token_weights),
        sequence_ids=None if sequence_ids is None else sequence_ids.reshape(-1),
        num_sequences=num_sequences,
        diagnostics=frozenset(diagnostics),
        tp_group=tp_group,
        cp_group=cp_group,
    )


def ranks(group: "dist.ProcessGroup | None") -> int:
    """Over how many ranks something is sharded."""
    return 1 if group is None else group.size()


def _flatten_teacher(
    teacher: Tensor | TeacherTopK | TeacherHidden | None,
    labels: Tensor,
    width: int,
    vocab_size: int,
    dtype: torch.dtype,
) -> DenseTeacher | SparseTeacher | HiddenTeacher | None:
    """The teacher of `labels` [...] for N tokens, detached."""
    n = labels.numel()
    if isinstance(teacher, TeacherTopK):
        flat = teacher.map(lambda x: x.detach().reshape(n, *x.shape[labels.dim() :]))
        return sparse_teacher(flat, labels.reshape(-1), vocab_size, dtype)
    if isinstance(teacher, TeacherHidden):
        hidden = teacher.hidden.detach()
        return HiddenTeacher(
            hidden.reshape(-1, hidden.shape[-1]), teacher.weight.detach(), teacher.absent
        )
    return None if teacher is None else DenseTeacher(teacher.detach().reshape(n, width))


def check_result(problem: Problem, out: QTargetOutput) -> QTargetOutput:
    """With TSFT_DEBUG=1, raise ValueError where teacher rows were not finite."""
    if checks.debugging() and int(out.bad_teacher_rows):
        bad_teacher = problem.labelled & ~out.supervised.reshape(-1)
        where = [int(i) for i in torch.nonzero(bad_teacher)[:8, 0]]
        raise ValueError(
            f"{int(out.bad_teacher_rows)} teacher rows are not finite, at flat token positions"
            f" {where}"
        )
    return out
