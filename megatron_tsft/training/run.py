"""A run from its command line to its last checkpoint: check, build, hand over to Megatron's own `pretrain`."""

import contextlib
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core.enums import ModelType
from megatron.training import get_timers, global_vars, pretrain
from megatron.training.argument_utils import pretrain_cfg_container_from_args
from megatron.training.models.gpt import GPTModelConfig

from megatron_tsft import upstream
from megatron_tsft.checkpoint.card import ModelCard, copy_card
from megatron_tsft.checkpoint.folder import TRACKER
from megatron_tsft.data.prepared import PreparedData
from megatron_tsft.errors import UserError
from megatron_tsft.model.packed_attention import packed_local_spec
from megatron_tsft.model.riding_teacher import GuidedModelConfig, load_teachers
from megatron_tsft.objectives import Objective
from megatron_tsft.training import arguments, checks
from megatron_tsft.training.config import TsftConfig
from megatron_tsft.training.datasets import Datasets
from megatron_tsft.training.forward_step import ForwardStep
from megatron_tsft.training.metrics import FILE, MetricsFile, MetricsWriter

SEED = 1234  # Megatron's default, needed before its flags are parsed


def run(argv: Sequence[str], device: str) -> None:
    """Train, evaluate, save, as the flags say.

    Args:
        argv: Megatron's flags and ours.
        device: "cuda" or "cpu" (the CPU layer is installed already).

    Raises:
        UserError: something does not fit; nothing has been trained then, and nothing written unless Megatron found it
            while it loaded the checkpoint.
    """
    given = arguments.given_flags(argv)
    applied = upstream.apply_all(asynchronous_saves="async_save" in given)
    config = TsftConfig.from_given(given)
    arguments.refuse_flags(given)
    arguments.check_fused_head(config, given)
    checks.check_required(config, given)
    card = ModelCard.load(config.model)
    arguments.check_card(given, card, config.model)
    batch = checks.check_layout(given, card, int(os.environ.get("WORLD_SIZE", "1")))
    train = PreparedData.load(config.data)
    evaluation = PreparedData.load(config.eval_data) if config.eval_data else None
    used = [train] if evaluation is None else [train, evaluation]
    for data in used:
        checks.check_data(data, card)
    objective = checks.load_objective(config, used)
    base = checks.check_checkpoints(config, card, given)
    datasets = Datasets(
        train,
        evaluation,
        seq_length=given["seq_length"],
        global_batch_size=batch,
        eval_global_batch_size=given.get("eval_global_batch_size", batch),
        seed=given.get("seed", SEED),
        truncate=config.long_samples == "truncate",
    )

    defaults = arguments.defaults_for(card, config, device, given) | {"seed": SEED}
    if config.check:  # no files, and no list of 800 arguments
        with contextlib.redirect_stdout(io.StringIO()):
            args = arguments.parse([*argv, "--tensorboard-dir", ""], defaults)
    else:
        args = arguments.parse(argv, defaults)
    args.eval_iters = datasets.eval_iters  # one exact pass
    if checks.resumes(given):
        args.load, args.finetune, args.no_load_optim, args.no_load_rng = args.save, False, False, False
    model_config = build_model_config(args, config, base)
    if args.rank == 0:
        print("\n".join(describe(objective, config, datasets, args, applied)), flush=True)
    if config.check:
        if args.rank == 0:
            print("everything fits; nothing was started (--tsft-check)", flush=True)
        return
    if args.save and args.rank == 0:
        copy_card(config.model, args.save)  # a checkpoint of this run exports from its own folder
    if args.rank == args.world_size - 1:
        install_metrics(args, datasets)

    check_nan = args.check_for_nan_in_loss_and_grad
    forward_step = ForwardStep(objective, card.vocab_size, device, datasets.train, check_nan, config.fuse_head)
    try:
        pretrain(
            pretrain_cfg_container_from_args(args, model_config),
            datasets,
            ModelType.encoder_or_decoder,
            forward_step,
        )
    except ValueError as error:
        if "Could not find parameter group" in str(error):  # they are told apart by these (core/optimizer/optimizer.py)
            raise UserError(
                f"{args.load} was trained with another --lr, --min-lr or weight decay: pass the same, or start anew"
                f" from its weights with --load {args.load} --finetune and another --save"
            ) from error
        raise
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def build_model_config(args: Any, config: TsftConfig, base: Path) -> GPTModelConfig:
    """Megatron's model configuration with packed attention and, if asked for, the riding teacher.

    Raises:
        UserError: Megatron refuses the combination of flags.
    """
    from megatron.training import argument_utils  # upstream/rope_factor.py replaces the function there

    guided = config.teacher == "reference"
    try:
        model_config = argument_utils.gpt_config_from_args(
            args, model_config_cls=GuidedModelConfig if guided else GPTModelConfig
        )
    except (AssertionError, ValueError) as error:
        raise arguments.refused_by_megatron(error) from error
    if args.transformer_impl == "local":
        model_config.transformer_layer_spec = packed_local_spec
    # several packs in one row, and the teacher's share of what stages send, have shapes that Megatron does not expect
    unusual = guided or args.micro_batch_size > 1 or args.eval_micro_batch_size > 1
    model_config.transformer.variable_seq_lengths = args.pipeline_model_parallel_size > 1 and unusual
    if guided:
        model_config.post_wrap_hooks.append(lambda model: load_teachers(model, base))
    return model_config


def install_metrics(args: Any, datasets: Datasets) -> None:
    """Put our writer where Megatron looks for TensorBoard's; on the last rank."""
    if not args.save:
        print("no --save: nothing will be kept, metrics.jsonl neither", flush=True)
        return
    interval, args.tensorboard_log_interval = args.tensorboard_log_interval, 1
    global_vars._GLOBAL_TENSORBOARD_WRITER = MetricsWriter(
        MetricsFile(Path(args.save) / FILE),
        global_vars._GLOBAL_TENSORBOARD_WRITER,
        active_seconds=active_seconds,
        interval=interval,
        print_interval=args.log_interval,
        eval_tokens=datasets.evaluation.supervised_tokens() if datasets.evaluation else 0,
    )


def active_seconds() -> float:
    """Seconds of training so far by Megatron's own timer, which stops for evaluations and saves."""
    timers: Any = get_timers()
    timer = timers("interval-time")
    timer.elapsed(reset=False)  # brings the running interval into the sum
    return timer.active_time()


def describe(
    objective: Objective, config: TsftConfig, datasets: Datasets, args: Any, applied: Sequence[str]
) -> list[str]:
    """The plan in a few lines."""
    train = datasets.train
    positions = int(train.positions.sum())
    steps = args.train_iters or args.train_samples // args.global_batch_size
    found = args.load and (Path(args.load) / TRACKER).is_file()
    start = (
        f"{args.load}, {(Path(args.load) / TRACKER).read_text().strip()} steps"
        if found
        else f"{config.model}, imported"
    )
    saves = f"{args.save}, every {args.save_interval} steps and at the end" if args.save else "nowhere"
    lines = [
        f"weights: {start}{', as a new run' if found and args.finetune else ''}; saves: {saves}",
        f"objective: {objective!r}, teacher: {config.teacher}, source: {objective.row.source}"
        f"{', in one with the LM head' if config.fuse_head else ''}",
        f"model: {config.model}; upstream repairs: {', '.join(applied) or 'none needed'}",
        f"train: {config.data}, {len(train.data)} conversations in {train.packs} packs of {args.seq_length}"
        f" ({100 * positions / (train.packs * args.seq_length):.0f}% full), {train.truncated} truncated;"
        f" {checks.epochs_text(steps, train.packs_per_epoch, args.global_batch_size)}",
    ]
    if datasets.evaluation is not None:
        held = datasets.evaluation
        when = f"every {args.eval_interval} steps and at the end" if args.eval_interval <= steps else "at the end"
        lines.append(
            f"evaluation: {config.eval_data}, {len(held.data)} conversations in {held.packs} packs, one exact pass"
            f" {when}"
        )
    return lines
