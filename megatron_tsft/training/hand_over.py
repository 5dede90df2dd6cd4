"""Hands a run over to Megatron's own `pretrain`: the one place where a plan and Megatron meet."""

import argparse
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

from megatron_tsft import console
from megatron_tsft.checkpoint.card import copy_card
from megatron_tsft.errors import Interrupted, UserError
from megatron_tsft.lock import Lock
from megatron_tsft.model.target_step import TargetStep
from megatron_tsft.plan.meeting import Meeting
from megatron_tsft.plan.plan import Plan
from megatron_tsft.training.datasets import Datasets
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

    kept = Kept(plan.config.keep_last, plan.config.keep_every)

    def before_save(model: Any, optimizer: Any) -> bool:
        if lock is not None:
            lock.check()
        if plan.start.fresh_optimizer and not watch.updated:
            # such a checkpoint has no optimizer state, and Megatron could not load it
            if ranks.rank == 0:
                console.say(f"step {watch.step} is not saved: fp16 has skipped all steps so far")
            return False
        watch.check_finite(model, optimizer, plan.device)
        return True

    gc.freeze()  # what is there now stays: no later collection looks at it
    gc.enable()
    try:
        with (
            signals.installed(*([args.exit_signal] if asked else [])),
            watching(watch, plan.device),
            listing(save, ranks.rank, kept, before_save),
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
            kept = "nothing is kept (no --save)"
            if save:
                kept = f"saved step {watch.step} in {save}; the same command goes on"
            name = signal.Signals(signals.received).name
            raise Interrupted(signals.received, f"stopped by {name}: {kept}") from stop
        watch.check_trained(anew=not plan.start.step)
        raise
    except ValueError as error:
        # they are told apart by these (core/optimizer/optimizer.py)
        if "Could not find parameter group" not in str(error):
            raise
        load: Any = args.load
        raise UserError(
            f"{load} was trained with another --lr, --min-lr or weight decay: pass the same, or"
            f" start anew from its weights with --load {load} --finetune and another --save"
        ) from error
    watch.check_trained(anew=not plan.start.step)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
