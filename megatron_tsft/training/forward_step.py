"""Megatron's forward step: one micro-batch of packs through the model, with our loss as the output
hook."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal

import torch
from megatron.core import mpu
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.utils import unwrap_model
from megatron.training import get_args, get_timers
from torch import Tensor

from megatron_tsft.data.batch import MicroBatch
from megatron_tsft.model.loss_reduction import reduce_loss
from megatron_tsft.model.output_hook import LossContext, q_target_output
from megatron_tsft.model.packed_attention import packed_sequences
from megatron_tsft.training.run_objectives import RunObjectives

LossFunction = Callable[[Tensor], tuple[Tensor, Tensor, dict[str, Tensor]]]


class ForwardStep:
    """What Megatron's schedules call for each micro-batch, on every pipeline stage."""

    def __init__(
        self,
        plan: RunObjectives,
        vocab_size: int,
        device: torch.device | str,
        where: Callable[[int], str],
        check_nan: bool,
        fuse_head: bool,
        teacher_tail: Literal["uniform", "drop"] = "uniform",
        reference_refresh: int = 0,
    ):
        """
        Args:
            plan: each data set's objective, and the evaluation's.
            vocab_size: the true vocabulary.
            device: where micro-batches go.
            where: for messages: which conversations the pack of a running number holds.
            check_nan: stop at a loss that is not finite (synchronises).
            fuse_head: the LM head is part of the loss.
            teacher_tail: what a cached teacher says of the tokens outside its top-k.
            reference_refresh: steps after which the reference takes the student's weights; 0 is
                never.
        """
        self.plan, self.vocab_size, self.device = plan.to(device), vocab_size, device
        self.where, self.check_nan, self.fuse_head = where, check_nan, fuse_head
        self.teacher_tail: Literal["uniform", "drop"] = teacher_tail
        self.reference_refresh = reference_refresh

    def __call__(
        self,
        data_iterator: Iterator[dict[str, Tensor]],
        model: Any,
        return_schedule_plan: bool = False,
    ) -> tuple[Tensor, LossFunction]:
        """(the model's output, what turns it into loss, token count and metrics). Every stage and
        TP rank reads its own packs: cutting them is cheaper than sending them."""
        timers: Any = get_timers()
        timers("batch-generator", log_level=2).start()
        chunk = mpu.get_context_parallel_rank(), mpu.get_context_parallel_world_size()
        batch = MicroBatch.from_packs(next(data_iterator), self.device, self.teacher_tail, *chunk)
        timers("batch-generator").stop()
        step = training_step()
        self.plan.set_step(step)
        if self.reference_refresh and model.training and step % self.reference_refresh == 0:
            unwrapped: Any = unwrap_model(model)
            unwrapped.take_reference(step)
        context = LossContext(
            objective=self.plan.of_batch(batch) if model.training else self.plan.evaluation,
            datasets=self.plan.names,
            parameters=self.plan.scheduled,
            batch=batch,
            vocab_size=self.vocab_size,
            training=model.training,
            tp_group=_group(mpu.get_tensor_model_parallel_group()),
            cp_group=_group(mpu.get_context_parallel_group()),
            fuse_head=self.fuse_head,
        )
        output = model(
            batch.tokens,
            batch.position_ids,
            None,
            labels=batch.labels,
            packed_seq_params=packed_sequences(batch.lengths, self.device, chunk[1]),
            output_processor=q_target_output,
            output_processor_context=context,
        )
        return output, partial(self._loss, context)

    def _loss(
        self, context: LossContext, output: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        share = 1 / (
            get_num_microbatches() * mpu.get_data_parallel_world_size(with_context_parallel=True)
        )
        loss, tokens, metrics = reduce_loss(context, share, output)
        if self.check_nan and context.training and not bool(torch.isfinite(loss)):
            raise RuntimeError(
                f"the loss of a micro-batch is {float(loss)}: {self._where(context)}"
            )
        return loss, tokens, metrics

    def _where(self, context: LossContext) -> str:
        """The conversations of a micro-batch, to look at."""
        return "; ".join(self.where(index) for index in context.batch.index)


def training_step() -> int:
    """The 0-based step that is being trained, or after which is evaluated (also where a resumed run
    has none left)."""
    args: Any = get_args()
    return max(args.curr_iteration, args.iteration - 1)


def _group(group: Any) -> Any:
    """None for a group of one rank: the loss then makes no collective."""
    return group if group.size() > 1 else None
