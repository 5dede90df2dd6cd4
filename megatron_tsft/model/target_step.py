"""One micro-batch through a model with our loss as its output hook, whichever loop calls."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.utils import unwrap_model
from torch import Tensor

from megatron_tsft.data.batch import MicroBatch
from megatron_tsft.loss.records import Tail
from megatron_tsft.model.loss_reduction import reduce_loss
from megatron_tsft.model.output_hook import LossContext, q_target_output
from megatron_tsft.model.packed_attention import packed_sequences
from megatron_tsft.model.poisoned import poisoned
from megatron_tsft.plan.plan import Plan
from megatron_tsft.plan.run_objectives import RunObjectives

Reduced = tuple[Tensor, Tensor, dict[str, Tensor]]  # loss sum, token count, {name: [sum, n]}


@dataclass(frozen=True)
class Groups:
    """The process groups that the loss needs; tp and cp are None where they have one rank, so that
    it makes no collective."""

    tp: Any = None
    cp: Any = None
    cp_rank: int = 0
    cp_size: int = 1

    @staticmethod
    def of(tp: Any, cp: Any) -> "Groups":
        """From torch's process groups."""
        alone = cp.size() == 1
        return Groups(None if tp.size() == 1 else tp, None if alone else cp, cp.rank(), cp.size())


class TargetStep:
    """What a run asks of each micro-batch, on every pipeline stage."""

    def __init__(
        self,
        objectives: RunObjectives,
        vocab_size: int,
        device: torch.device | str,
        *,
        where: Callable[[int], str],
        check_nan: bool = True,
        fuse_head: bool = False,
        tail: Tail = "uniform",
        refresh: int = 0,
    ):
        """
        Args:
            objectives: each data set's, and the evaluation's.
            vocab_size: the true vocabulary.
            device: where micro-batches go.
            where: for messages: which conversations the pack of a running number holds.
            check_nan: stop at a loss that is not finite (synchronises).
            fuse_head: the LM head is part of the loss.
            tail: what a cached teacher says of the tokens outside its top-k.
            refresh: steps after which the reference takes the student's weights; 0 is never.
        """
        self.objectives, self.vocab_size, self.device = objectives.to(device), vocab_size, device
        self.where, self.check_nan, self.fuse_head = where, check_nan, fuse_head
        self.tail: Tail = tail
        self.refresh = refresh
        self.step = -1
        self._indices: list[list[int]] = []  # of the packs of this step, on this rank

    @staticmethod
    def of_plan(plan: Plan, *, check_nan: bool) -> "TargetStep":
        """The step that a plan asks for."""
        return TargetStep(
            plan.objectives,
            plan.card.vocab_size,
            plan.device,
            where=plan.packs.where,
            check_nan=check_nan,
            fuse_head=plan.config.fuse_head,
            tail=plan.teacher.tail,
            refresh=plan.teacher.refresh,
        )

    def forward(
        self, packs: Mapping[str, Tensor], model: Any, step: int, groups: Groups
    ) -> tuple[Tensor, LossContext]:
        """(the model's output, what `reduce` needs to know of it).

        Args:
            packs: of the data loader, [micro-batch, seq_length] each, on the host.
            model: this stage, wrapped or not.
            step: the 0-based step that is trained, or after which is evaluated.
            groups: of the loss.
        """
        place = groups.cp_rank, groups.cp_size
        batch = MicroBatch.from_packs(packs, self.device, self.tail, *place)
        self.objectives.set_step(step)
        if model.training:
            if step != self.step:
                self.step, self._indices = step, []
            self._indices.append(batch.index)
        if self.refresh and model.training and step % self.refresh == 0:
            unwrapped: Any = unwrap_model(model)
            unwrapped.take_reference(step)
        objective = self.objectives.evaluation
        context = LossContext(
            objective=self.objectives.of_batch(batch) if model.training else objective,
            datasets=self.objectives.names,
            parameters=self.objectives.scheduled,
            batch=batch,
            vocab_size=self.vocab_size,
            training=model.training,
            tp_group=groups.tp,
            cp_group=groups.cp,
            fuse_head=self.fuse_head,
        )
        return run_packed(
            model, batch, q_target_output, context, self.device, groups.cp_size
        ), context

    def reduce(self, context: LossContext, samples_share: float, output: Tensor) -> Reduced:
        """The loss, the token count and the metrics of a micro-batch.

        samples_share: 1 / (micro-batches * data-parallel ranks).

        Raises:
            UserError: a loss in training is not finite; the message names the step, the rank and
                the conversations.
        """
        loss, tokens, metrics = reduce_loss(context, samples_share, output)
        if self.check_nan and context.training and not bool(torch.isfinite(loss)):
            where = [self.where(index) for index in context.batch.index]
            raise poisoned(self.step + 1, f"the loss of a micro-batch is {float(loss)}", where)
        return loss, tokens, metrics

    def held(self) -> list[str]:
        """What the micro-batches of this step held so far, on this rank."""
        return [self.where(index) for indices in self._indices for index in indices]


def run_packed(
    model: Any,
    batch: MicroBatch,
    output_processor: Any,
    context: Any,
    device: torch.device | str,
    context_size: int = 1,
) -> Tensor:
    """A micro-batch of packs through a GPTModel, whose output is the hook's.

    Args:
        model: this stage.
        batch: the packs.
        output_processor: the hook, called on the last stage.
        context: what it is given.
        device: where the batch is.
        context_size: context-parallel ranks.
    """
    return model(
        batch.tokens,
        batch.position_ids,
        None,
        labels=batch.labels,
        packed_seq_params=packed_sequences(batch.lengths, device, context_size),
        output_processor=output_processor,
        output_processor_context=context,
    )
