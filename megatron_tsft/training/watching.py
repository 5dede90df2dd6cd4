"""Puts a watch on Megatron's loop, which has no hooks: the names that it calls are replaced."""

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from megatron.training import get_args, global_vars, training

from megatron_tsft.training.watch import Watch


@contextlib.contextmanager
def watching(watch: Watch, device: torch.device | str) -> Iterator[None]:
    """Inside, `train_step` reports to the watch, and the loop asks it at the end of each step
    whether to stop: there Megatron asks its own handler of --exit-signal-handler
    (training/training.py, checkpoint_and_decide_exit), before the step is saved."""
    train_step, handler = training.train_step, global_vars._GLOBAL_SIGNAL_HANDLER

    def watched(*args: Any, iteration: int, **kwargs: Any) -> Any:
        model, optimizer = args[2:4]
        arguments: Any = get_args()
        arguments.exit_signal_handler = True
        watch.before(iteration + 1, training.get_canonical_lr_for_logging(optimizer.param_groups))
        try:
            result = train_step(*args, iteration=iteration, **kwargs)
        except RuntimeError as error:
            if (told := watch.failed(error)) is not None:
                raise told from error
            raise
        losses, skipped, _, _, _, grad_norm, *_ = result
        watch.after(losses, bool(skipped), grad_norm)
        return result

    training.train_step = watched
    ours: Any = SimpleNamespace(signals_received=lambda: [watch.stop_asked(device)])
    global_vars._GLOBAL_SIGNAL_HANDLER = ours
    try:
        yield
    finally:
        training.train_step, global_vars._GLOBAL_SIGNAL_HANDLER = train_step, handler
