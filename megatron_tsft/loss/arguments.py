"""What both losses are asked: everything but the logits, checked and flattened into a `Problem`."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tsft.loss import checks
from megatron_tsft.loss.records import QTargetOutput, TeacherHidden, TeacherTopK
from megatron_tsft.loss.targets import Problem
from megatron_tsft.loss.teacher import DenseTeacher, HiddenTeacher, SparseTeacher, sparse_teacher
from megatron_tsft.objectives import Objective, Scalar, as_like


@dataclass(frozen=True)
class Arguments:
    """The keywords that `q_target_cross_entropy` and `q_target_linear_cross_entropy` share; api.py
    describes them."""

    labels: Tensor  # [...] int64
    objective: Objective
    teacher: Tensor | TeacherTopK | TeacherHidden | None
    reference_logprobs: Tensor | None  # [...]
    token_weights: Tensor | None  # [...]
    sequence_ids: Tensor | None  # [...] int64
    num_sequences: int | None
    logit_scale: float
    diagnostics: Sequence[str]
    tp_group: "dist.ProcessGroup | None"
    cp_group: "dist.ProcessGroup | None"
    vocab_size: int | None
    ignore_index: int

    @property
    def ranks(self) -> int:
        """Over how many ranks the vocabulary is sharded."""
        return 1 if self.tp_group is None else self.tp_group.size()

    def problem(self, like: Tensor, width: int, like_name: str = "logits") -> Problem:
        """Check everything and flatten it to N tokens.

        Args:
            like: the logits or the head's weight: device and type.
            width: V/tp.
            like_name: what messages call it.
        """
        checks.check_tensors(self, like, width, like_name)
        vocab_size = width * self.ranks if self.vocab_size is None else int(self.vocab_size)
        checks.check_numbers(width, self.ranks, vocab_size, self.logit_scale, self.diagnostics)
        objective = self.objective.flatten(self.labels.shape)
        plan = objective.residual_plan(like.device)
        checks.check_combination(self, objective, plan)
        if checks.debugging():
            checks.check_labels(self.labels, vocab_size, self.ignore_index)

        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        labels = self.labels.reshape(-1)
        reference = self.reference_logprobs
        if reference is None and isinstance(self.teacher, TeacherTopK):
            if objective.needs & {"reference_logp_y", "sequence_log_ratio"}:
                reference = self.teacher.label_logprobs

        def vector(value: Tensor | None) -> Tensor | None:
            return None if value is None else value.reshape(-1).to(dtype).detach()

        def number(value: Scalar) -> Scalar:
            return (
                as_like(value, like.new_empty(0, dtype=dtype))
                if isinstance(value, Tensor)
                else float(value)
            )

        num_sequences = self.num_sequences or 0
        if self.sequence_ids is not None and self.num_sequences is None:
            num_sequences = int(self.sequence_ids.max()) + 1 if self.sequence_ids.numel() else 0
        return Problem(
            labels=labels,
            labelled=labels != self.ignore_index,
            objective=objective,
            plan=plan,
            a=number(plan.a),
            b=number(plan.b),
            scale=float(self.logit_scale),
            vocab_size=vocab_size,
            offset=0 if self.tp_group is None else self.tp_group.rank() * width,
            teacher=self._teacher(labels, width, vocab_size, dtype),
            reference_logprobs=vector(reference),
            token_weights=vector(self.token_weights),
            sequence_ids=None if self.sequence_ids is None else self.sequence_ids.reshape(-1),
            num_sequences=num_sequences,
            diagnostics=frozenset(self.diagnostics),
            tp_group=self.tp_group,
            cp_group=self.cp_group,
        )

    def _teacher(
        self, labels: Tensor, width: int, vocab_size: int, dtype: torch.dtype
    ) -> DenseTeacher | SparseTeacher | HiddenTeacher | None:
        teacher, n = self.teacher, labels.numel()
        if isinstance(teacher, TeacherTopK):
            k = teacher.ids.shape[-1]
            tail_mass = teacher.tail_logmass
            flat = TeacherTopK(
                teacher.ids.reshape(n, k),
                teacher.logprobs.reshape(n, k).detach(),
                teacher.tail,
                tail_logmass=None if tail_mass is None else tail_mass.reshape(n).to(dtype).detach(),
            )
            return sparse_teacher(flat, labels, vocab_size, dtype)
        if isinstance(teacher, TeacherHidden):
            hidden = teacher.hidden.detach()
            return HiddenTeacher(
                hidden.reshape(-1, hidden.shape[-1]), teacher.weight.detach(), teacher.absent
            )
        return None if teacher is None else DenseTeacher(teacher.detach().reshape(n, width))

    def check_result(self, out: QTargetOutput) -> QTargetOutput:
        """With TSFT_DEBUG=1, raise ValueError where teacher rows were not finite."""
        if checks.debugging() and int(out.bad_teacher_rows):
            bad = (self.labels != self.ignore_index) & ~out.supervised
            where = torch.nonzero(bad.reshape(-1))[:8, 0].tolist()
            raise ValueError(
                f"{int(out.bad_teacher_rows)} teacher rows are not finite, at flat token positions"
                f" {where}"
            )
        return out
