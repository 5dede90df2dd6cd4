"""Hands a run over to Megatron's own `pretrain`: the one place where a plan and Megatron meet."""

import argparse
import functools
import gc
import signal
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from megatron.core.enums import ModelType
from megatron.training import pretrain
from megatron.training.argument_utils import pretrain_cfg_container_from_args
from megatron.training.models.gpt import GPTModelConfig
from torch.distributed.checkpoint.api import CheckpointException

from megatron_tsft import console
from megatron_tsft.checkpoint.card import copy_card
from megatron_tsft.errors import Interrupted, UserError
from megatron_tsft.lock import Lock
from megatron_tsft.model.target_step import TargetStep
from megatron_tsft.plan.meeting import Meeting
from megatron_tsft.plan.plan import Plan
from megatron_tsft.training.datasets import Datasets
from megatron_tsft.training.failures import explain
from megatron_tsft.training.forward_step import ForwardStep
from megatron_tsft.training.metrics import install_metrics
from megatron_tsft.training.old_checkpoints import Kept
from megatron_tsft.training.save_lists import listing
from megatron_tsft.training.stop_signals import StopSignals
from megatron_tsft.training.watch import Watch
from megatron_tsft.training.watching import watching


def hand_over(
    args: argparse.Namespace,
    config: GPTModelConfig,
    plan: Plan,
    meeting: Meeting,
    lock: Lock | None,
) -> None:
    """Train, evaluate and save in Megatron's loop.

    Args:
        args: Megatron's.
        config: of the model.
        plan: of the run.
        meeting: of its ranks.
        lock: of the save folder, on rank 0.

    Raises:
        UserError: the checkpoint's optimizer belongs to other settings.
    """
    ranks, save = plan.line.ranks, plan.flags.save
    if save and ranks.rank == 0:
        copy_card(plan.config.model, save)  # a checkpoint of this run exports from its own folder
        plan.served.save(save)
    if save and not plan.config.verbose:
        title = " ".join(plan.line.argv)
        console.keep_log(Path(save) / "logs" / f"rank-{ranks.rank:05d}.txt", title)
        if ranks.rank == 0:
            console.say(f"log: {save}/logs/ has all that Megatron says, a file for each rank")
    step = TargetStep.of_plan(plan, check_nan=args.check_for_nan_in_loss_and_grad)
    signals, names = StopSignals(), " and ".join(map(repr, plan.objectives.members))
    watch = Watch(step.held, signals, objective=names, spike=plan.config.stop_at_spike)
    if ranks.rank == ranks.size - 1:
        install_metrics(args, plan, lambda: watch.learning_rate)
    # with it, Megatron has workers of data loaders ignore what ends them; `watching` sets it again
    asked, args.exit_signal_handler = args.exit_signal_handler, False
    gc.freeze()  # what is there now stays: no later collection looks at it
    gc.enable()
    try:
        with (
            signals.installed(*([args.exit_signal] if asked else [])),
            watching(watch, plan.device),
            listing(
                save,
                ranks.rank,
                Kept(plan.config.keep_last, plan.config.keep_every),
                functools.partial(_may_save, plan, watch, lock),
            ),
        ):
            pretrain(
                pretrain_cfg_container_from_args(args, config),
                Datasets(plan.packs),
                ModelType.encoder_or_decoder,
                ForwardStep(step),
                store=meeting.torchs_store(timedelta(minutes=args.distributed_timeout_minutes)),
            )
    except SystemExit as stop:
        if signals.received is not None:
            if torch.distributed.is_initialized():
                torch.distributed.barrier()  # torchrun ends all when the first has ended
            raise Interrupted(signals.received, _stopped(plan, watch, signals.received)) from stop
        watch.check_trained(anew=not plan.start.step)
        raise
    except UserError:
        raise
    except (Exception, CheckpointException) as error:
        if (told := explain(error, plan, meeting, watch.step)) is not None:
            raise told from error
        if not isinstance(error, Exception):  # torch's is none: nobody would report it
            raise RuntimeError(f"a checkpoint could not be written: {error}") from error
        raise
    watch.check_trained(anew=not plan.start.step)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def _may_save(plan: Plan, watch: Watch, lock: Lock | None, model: Any, optimizer: Any) -> bool:
    """Whether there is something to save.

    Raises:
        UserError: another run has taken the folder over, or a number is not finite.
    """
    if lock is not None:
        lock.check()
    if _nothing_yet(plan, watch):
        if plan.line.ranks.rank == 0:
            console.say(f"step {watch.step} is not saved: fp16 has skipped all steps so far")
        return False
    watch.check_finite(model, optimizer, plan.device)
    return True


def _nothing_yet(plan: Plan, watch: Watch) -> bool:
    """Whether the optimizer has no state yet: Megatron could not load such a checkpoint."""
    return plan.start.fresh_optimizer and not watch.updated


def _stopped(plan: Plan, watch: Watch, number: int) -> str:
    """What has become of a run that a signal ended."""
    kept = "nothing is kept (no --save)"
    if plan.flags.save:
        kept = f"saved step {watch.step} in {plan.flags.save}; the same command goes on"
        if _nothing_yet(plan, watch):
            kept = "no step was made yet; the same command begins again"
    return f"stopped by {signal.Signals(number).name}: {kept}"
