"""Megatron's forward step: what its schedules call for each micro-batch."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from megatron.core import mpu
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.training import get_args, get_timers
from torch import Tensor

from megatron_tsft.model.output_hook import LossContext
from megatron_tsft.model.target_step import Groups, Reduced, TargetStep


class ForwardStep:
    """A `TargetStep` that takes steps, groups and counts from Megatron's globals."""

    def __init__(self, step: TargetStep):
        self.step = step

    def __call__(
        self,
        data_iterator: Iterator[dict[str, Tensor]],
        model: Any,
        return_schedule_plan: bool = False,
    ) -> tuple[Tensor, Callable[[Tensor], Reduced]]:
        """(the model's output, what turns it into loss, token count and metrics). Every stage and
        TP rank reads its own packs: cutting them is cheaper than sending them."""
        timers: Any = get_timers()
        timers("batch-generator", log_level=2).start()
        packs = next(data_iterator)
        timers("batch-generator").stop()
        groups = Groups.of(mpu.get_tensor_model_parallel_group(), mpu.get_context_parallel_group())
        output, context = self.step.forward(packs, model, training_step(), groups)
        return output, partial(self._reduce, context)

    def _reduce(self, context: LossContext, output: Tensor) -> Reduced:
        ranks = mpu.get_data_parallel_world_size(with_context_parallel=True)
        return self.step.reduce(context, 1 / (get_num_microbatches() * ranks), output)


def training_step() -> int:
    """The 0-based step that is being trained, or after which is evaluated (also where a resumed run
    has none left)."""
    args: Any = get_args()
    return max(args.curr_iteration, args.iteration - 1)
