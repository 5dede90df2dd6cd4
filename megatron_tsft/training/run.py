"""A run from its command line to its last checkpoint: check, build, hand over to Megatron's own
`pretrain`."""

import contextlib
import gc
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
from megatron_tsft.model.loss_reduction import PER_DATASET
from megatron_tsft.model.riding_teacher import GuidedModelConfig, RidingTeacher
from megatron_tsft.training import arguments, checks, teachers
from megatron_tsft.training.auxiliary_losses import AuxiliaryScale, has_auxiliary_losses
from megatron_tsft.training.config import TsftConfig
from megatron_tsft.training.datasets import Datasets
from megatron_tsft.training.forward_step import ForwardStep
from megatron_tsft.training.metrics import FILE, MetricsFile, MetricsWriter
from megatron_tsft.training.pack_length import check_pack, document_multiple
from megatron_tsft.training.precision import check_precision, keep_start_weights
from megatron_tsft.training.run_objectives import RunObjectives
from megatron_tsft.training.same_packs import SAVED, check_same_packs, facts_of_packs
from megatron_tsft.training.sources import parse_sources

SEED = 1234  # Megatron's default, needed before its flags are parsed


def run(argv: Sequence[str], device: str) -> None:
    """Train, evaluate, save, as the flags say.

    Args:
        argv: Megatron's flags and ours.
        device: "cuda" or "cpu" (the CPU layer is installed already).

    Raises:
        UserError: something does not fit; nothing has been trained then, and nothing written unless
            Megatron found it while it loaded the checkpoint.
    """
    given = arguments.given_flags(argv)
    applied = upstream.apply_all(asynchronous_saves="async_save" in given)
    config = TsftConfig.from_given(given)
    arguments.refuse_flags(given)
    arguments.check_fused_head(config, given)
    teachers.check_teacher_flags(config, given)
    checks.check_required(config, given)
    card = ModelCard.load(config.model)
    arguments.check_card(given, card, config.model)
    batch = checks.check_layout(given, card, int(os.environ.get("WORLD_SIZE", "1")))
    defaults = arguments.defaults_for(card, config, device, given) | {"seed": SEED}
    check_precision(defaults | given, device, engine=arguments.engine_installed())
    check_pack(defaults | given)
    sources = parse_sources(config.data)
    train = [PreparedData.load(source.directory) for source in sources]
    evaluation = PreparedData.load(config.eval_data) if config.eval_data else None
    used = train if evaluation is None else [*train, evaluation]
    for data in used:
        checks.check_data(data, card)
    explicit = bool({"tsft_objective", "tsft_args"} & given.keys())
    plan = checks.load_objectives(config, sources, train, evaluation, explicit)
    base, resumed = checks.check_checkpoints(
        config, card, given, engine=arguments.uses_engine(given, device)
    )
    packs = {
        "seq_length": given["seq_length"],
        "seed": given.get("seed", SEED),
        "document_multiple": document_multiple(given),
    }
    datasets = Datasets(
        train,
        [source.share for source in sources],
        evaluation,
        caches=teachers.load_caches(config, card),
        taught=[objective.reads_teacher for objective in plan.all],
        **packs,
        global_batch_size=batch,
        eval_global_batch_size=given.get("eval_global_batch_size", batch),
        truncate=config.long_samples == "truncate",
    )
    facts = facts_of_packs(datasets, **packs)
    if resumed is not None:
        check_same_packs(resumed, facts, datasets, batch, given)

    if config.check:  # no files, and no list of 800 arguments
        with contextlib.redirect_stdout(io.StringIO()):
            args = arguments.parse([*argv, "--tensorboard-dir", ""], defaults)
    else:
        args = arguments.parse(argv, defaults)
    keep_start_weights(args)
    args.eval_iters = datasets.eval_iters  # one exact pass
    setattr(args, SAVED, facts)  # checkpoints keep them: a run that resumes is held to them
    if checks.resumes(given):
        args.load, args.finetune, args.no_load_optim, args.no_load_rng = (
            args.save,
            False,
            False,
            False,
        )
    model_config = build_model_config(
        args, teachers.riding_teacher(config, card, base, args, given, used)
    )
    if has_auxiliary_losses(args):
        model_config.transformer.moe_grad_scale_func = AuxiliaryScale(
            model_config.transformer, datasets
        )
    if args.rank == 0:
        print("\n".join(describe(plan, config, datasets, args, applied)), flush=True)
    if config.check:
        if args.rank == 0:
            print("everything fits; nothing was started (--tsft-check)", flush=True)
        return
    if args.save and args.rank == 0:
        copy_card(config.model, args.save)  # a checkpoint of this run exports from its own folder
    if args.rank == args.world_size - 1:
        install_metrics(args, datasets, plan)

    forward_step = ForwardStep(
        plan,
        card.vocab_size,
        device,
        datasets.where,
        args.check_for_nan_in_loss_and_grad,
        config.fuse_head,
        teacher_tail=config.teacher_tail,  # pyright: ignore[reportArgumentType]  # one of its choices
        reference_refresh=config.reference_refresh,
    )
    gc.freeze()  # what is there now stays: no later collection looks at it
    gc.enable()
    try:
        pretrain(
            pretrain_cfg_container_from_args(args, model_config),
            datasets,
            ModelType.encoder_or_decoder,
            forward_step,
        )
    except ValueError as error:
        if "Could not find parameter group" in str(
            error
        ):  # they are told apart by these (core/optimizer/optimizer.py)
            raise UserError(
                f"{args.load} was trained with another --lr, --min-lr or weight decay: pass the"
                " same, or start anew"
                f" from its weights with --load {args.load} --finetune and another --save"
            ) from error
        raise
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def build_model_config(args: Any, riding: RidingTeacher | None) -> GPTModelConfig:
    """Megatron's model configuration with packed attention and, if asked for, the riding teacher.

    Raises:
        UserError: Megatron refuses the combination of flags.
    """
    model_config = arguments.model_config(
        args, GPTModelConfig if riding is None else GuidedModelConfig
    )
    # several packs in one row, and the teacher's share of what stages send, have shapes that
    # Megatron does not expect
    unusual = riding is not None or args.micro_batch_size > 1 or args.eval_micro_batch_size > 1
    model_config.transformer.variable_seq_lengths = (
        args.pipeline_model_parallel_size > 1 and unusual
    )
    if riding is not None:
        riding.config.transformer.variable_seq_lengths = (
            model_config.transformer.variable_seq_lengths
        )
        model_config.add_teacher(riding)
    return model_config


def install_metrics(args: Any, datasets: Datasets, plan: RunObjectives) -> None:
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
        eval_tokens=int(datasets.evaluation.supervised.sum()) if datasets.evaluation else 0,
        extra=extra_metrics(datasets, plan),
    )


def extra_metrics(datasets: Datasets, plan: RunObjectives) -> list[str]:
    """Metrics that only some runs have: token weights, scheduled parameters, values of each data
    set of a mixture."""
    names = ["weight"] if any(part.data.card.weighted for part in datasets.members) else []
    names += plan.scheduled
    if len(plan.names) > 1:
        names += [f"{key}/{name}" for name in plan.names for key in (*PER_DATASET, "tokens")]
    return names


def active_seconds() -> float:
    """Seconds of training so far by Megatron's own timer, which stops for evaluations and saves."""
    timers: Any = get_timers()
    timer = timers("interval-time")
    timer.elapsed(reset=False)  # brings the running interval into the sum
    return timer.active_time()


def describe(
    plan: RunObjectives, config: TsftConfig, datasets: Datasets, args: Any, applied: Sequence[str]
) -> list[str]:
    """The plan in a few lines."""
    steps = args.train_iters or args.train_samples // args.global_batch_size
    found = args.load and (Path(args.load) / TRACKER).is_file()
    start = (
        f"{args.load}, {(Path(args.load) / TRACKER).read_text().strip()} steps"
        if found
        else f"{config.model}, imported"
    )
    saves = (
        f"{args.save}, every {args.save_interval} steps and at the end" if args.save else "nowhere"
    )
    lines = [
        f"weights: {start}{', as a new run' if found and args.finetune else ''}; saves: {saves}",
        f"model: {config.model}; teacher: {describe_teacher(config)}; upstream repairs:"
        f" {', '.join(applied) or 'none needed'}",
    ]
    whole = sum(datasets.shares)
    multiple = getattr(args, SAVED)["--tsft-document-multiple"]
    padded = f"padded to multiples of {multiple}, " if multiple > 1 else ""
    for part, objective, share in zip(datasets.members, plan.members, datasets.shares, strict=True):
        full = 100 * int(part.positions.sum()) / (part.packs * args.seq_length)
        mixed = f"{100 * share / whole:.3g}% of the packs; " if len(datasets.members) > 1 else ""
        epochs = checks.epochs_text(
            steps, part.packs_per_epoch, args.global_batch_size, share / whole
        )
        lines += [
            f"objective: {objective!r}, source: {objective.row.source}"
            f"{', in one with the LM head' if config.fuse_head else ''}",
            f"train: {part.data.directory}, {len(part.data)} conversations in {part.packs} packs"
            f" of {args.seq_length}"
            f" ({full:.0f}% full), {padded}{part.truncated} truncated; {mixed}"
            f"{epochs}",
        ]
    if datasets.evaluation is not None:
        held = datasets.evaluation
        when = (
            f"every {args.eval_interval} steps and at the end"
            if args.eval_interval <= steps
            else "at the end"
        )
        lines.append(
            f"evaluation: {config.eval_data}, {len(held.data)} conversations in {held.packs}"
            " packs, one exact pass"
            f" {when}, by {plan.evaluation!r}"
        )
    return lines


def describe_teacher(config: TsftConfig) -> str:
    """Where the second distribution comes from."""
    refreshed = f", anew every {config.reference_refresh} steps" if config.reference_refresh else ""
    return {
        "none": "none",
        "reference": f"the imported model{refreshed}",
        "model": config.teacher_load,
        "cache": f"cached in {', '.join(config.teacher_cache)}, tail {config.teacher_tail}",
    }[config.teacher]
