"""Hands a run over to Megatron's own `pretrain`: the one place where a plan and Megatron meet."""

import argparse
import gc
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
from megatron_tsft.errors import UserError
from megatron_tsft.lock import Lock
from megatron_tsft.model.target_step import TargetStep
from megatron_tsft.plan.meeting import Meeting
from megatron_tsft.plan.plan import Plan
from megatron_tsft.training.datasets import Datasets
from megatron_tsft.training.forward_step import ForwardStep
from megatron_tsft.training.metrics import install_metrics
from megatron_tsft.training.save_lists import listing


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
    if ranks.rank == ranks.size - 1:
        install_metrics(args, plan)
    step = TargetStep.of_plan(plan, check_nan=args.check_for_nan_in_loss_and_grad)
    gc.freeze()  # what is there now stays: no later collection looks at it
    gc.enable()
    try:
        with listing(save, ranks.rank, lock):
            pretrain(
                pretrain_cfg_container_from_args(args, config),
                Datasets(plan.packs),
                ModelType.encoder_or_decoder,
                ForwardStep(step),
                store=meeting.torchs_store(timedelta(minutes=args.distributed_timeout_minutes)),
            )
    except ValueError as error:
        # they are told apart by these (core/optimizer/optimizer.py)
        if "Could not find parameter group" not in str(error):
            raise
        load: Any = args.load
        raise UserError(
            f"{load} was trained with another --lr, --min-lr or weight decay: pass the same, or"
            f" start anew from its weights with --load {load} --finetune and another --save"
        ) from error
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
