"""What must fit before the first step: layout, data, objective, teacher and checkpoint."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing import load_common_state_dict

from megatron_tsft import objectives
from megatron_tsft.checkpoint.card import CARD_FILE, ModelCard
from megatron_tsft.checkpoint.folder import TRACKER, latest_checkpoint, read_metadata
from megatron_tsft.checkpoint.keys import compare_keys
from megatron_tsft.checkpoint.units import expected_keys, extra_states
from megatron_tsft.data.prepared import PreparedData
from megatron_tsft.errors import UserError
from megatron_tsft.loss import TeacherTopK, q_target_cross_entropy
from megatron_tsft.objectives import SingleObjective as Objective
from megatron_tsft.training.config import TsftConfig
from megatron_tsft.training.run_objectives import RunObjectives
from megatron_tsft.training.same_packs import Resumed
from megatron_tsft.training.sources import Source

LAST_STEP = 1 << 40  # beyond the end of any schedule


def check_required(config: TsftConfig, given: Mapping[str, Any]) -> None:
    """Raise UserError for a flag that every run needs and that is missing."""
    needed = {
        "--tsft-model": config.model,
        "--tsft-data": config.data,
        "--seq-length": given.get("seq_length"),
        "--train-iters (or --train-samples)": given.get("train_iters")
        or given.get("train_samples"),
        "--micro-batch-size": given.get("micro_batch_size"),
        "--lr": given.get("lr"),
    }
    missing = [name for name, value in needed.items() if not value]
    if missing:
        raise UserError(f"missing {', '.join(missing)}: --help has an example of a whole command")


def heads_divide(heads: int, groups: int, tp: int) -> bool:
    """Whether attention heads and key-value groups divide over `tp` tensor-parallel ranks; few
    groups are repeated."""
    return heads % tp == 0 and (groups % tp == 0 or tp % groups == 0)


def check_layout(given: Mapping[str, Any], card: ModelCard, world_size: int) -> int:
    """The global batch size; raises UserError where the layout does not divide the model, the batch
    or the ranks."""
    model = card.megatron_arguments
    tp, pp = (
        given.get("tensor_model_parallel_size", 1),
        given.get("pipeline_model_parallel_size", 1),
    )
    heads, groups, layers = (
        model["num_attention_heads"],
        model["num_query_groups"],
        model["num_layers"],
    )
    if not heads_divide(heads, groups, tp):
        fit = [n for n in range(1, heads + 1) if heads_divide(heads, groups, n)]
        raise UserError(
            f"--tensor-model-parallel-size {tp} does not divide the model's {heads} attention"
            f" heads and {groups}"
            f" key-value groups: use one of {', '.join(map(str, fit))}"
        )
    uneven = {
        "decoder_first_pipeline_num_layers",
        "decoder_last_pipeline_num_layers",
        "pipeline_model_parallel_layout",
    }
    uneven |= {"account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split"}
    if layers % pp and not uneven & given.keys():
        fit = [n for n in range(1, layers + 1) if layers % n == 0]
        raise UserError(
            f"--pipeline-model-parallel-size {pp} does not divide {layers} layers: use one of"
            f" {fit}, or"
            " --decoder-first-pipeline-num-layers for an uneven split"
        )
    cp = given.get("context_parallel_size", 1)
    if world_size % (tp * pp * cp):
        context = f" x context {cp}" if cp > 1 else ""
        raise UserError(
            f"{world_size} processes are not a multiple of tensor {tp} x pipeline {pp}{context}:"
            f" start {tp * pp * cp}"
        )
    micro, dp = given["micro_batch_size"], world_size // (tp * pp * cp)
    batch = given.get("global_batch_size", micro * dp)
    _check_expert_layout(given, model.get("num_experts"), world_size)
    if batch % (micro * dp):
        raise UserError(
            f"--global-batch-size {batch} is not a multiple of --micro-batch-size {micro} x {dp}"
            " data-parallel ranks"
        )
    longest = model["max_position_embeddings"]
    if given["seq_length"] > longest:
        raise UserError(
            f"--seq-length {given['seq_length']} exceeds the model's {longest} positions: use at"
            " most that"
        )
    return batch


def _check_expert_layout(given: Mapping[str, Any], experts: int | None, world_size: int) -> None:
    """Raise UserError where --expert-model-parallel-size does not divide the experts or the
    ranks."""
    parallel, tp = (
        given.get("expert_model_parallel_size", 1),
        given.get("tensor_model_parallel_size", 1),
    )
    if parallel == 1:
        return
    if not experts:
        raise UserError(
            f"--expert-model-parallel-size {parallel}: the model has no experts, leave it out"
        )
    if experts % parallel:
        raise UserError(
            f"--expert-model-parallel-size {parallel} does not divide the model's {experts}"
            " experts: use a divisor"
        )
    expert_tp = given.get("expert_tensor_parallel_size", tp)
    ranks = parallel * expert_tp * given.get("pipeline_model_parallel_size", 1)
    if world_size % ranks:
        raise UserError(
            f"{world_size} processes are not a multiple of {ranks}, which expert parallel"
            f" {parallel} x expert tensor"
            f" {expert_tp} x pipeline parallel need: start {ranks}"
            + (", or pass --expert-tensor-parallel-size 1" if expert_tp > 1 else "")
        )


def load_objectives(
    config: TsftConfig,
    sources: Sequence[Source],
    train: Sequence[PreparedData],
    evaluation: PreparedData | None,
    explicit: bool,
) -> RunObjectives:
    """The objectives that the flags ask for, each tried on one token so that every rule is the
    loss's own.

    Args:
        config: objective, args, teacher, plugin.
        sources: the data sets to train on.
        train: their prepared folders.
        evaluation: the held-out data, or None. It has --tsft-objective, or the first data set's
            where all have one.
        explicit: --tsft-objective was given.

    Raises:
        UserError: unknown name or parameter, a broken plugin, weights that the data lacks, or a
            teacher that is missing or useless.
    """
    try:
        for file in config.plugin:
            objectives.load_plugin(file)
    except Exception as error:  # a user's own code may raise anything
        raise UserError(
            f"--tsft-plugin {' '.join(config.plugin)}: {type(error).__name__}: {error}"
        ) from error
    members = [
        _objective(f"--tsft-data {source.directory}", source.objective)
        if source.objective
        else _objective("--tsft-objective, --tsft-args", ",".join([config.objective, *config.args]))
        for source in sources
    ]
    if (
        all(source.objective for source in sources)
        and (config.args or explicit)
        and evaluation is None
    ):
        raise UserError(
            "every --tsft-data has its own objective: leave --tsft-objective and --tsft-args out"
        )
    own = explicit or not all(source.objective for source in sources)
    text = ",".join([config.objective, *config.args]) if own else sources[0].objective
    plan = RunObjectives(
        [source.name for source in sources], members, _objective("--tsft-objective", text)
    )
    if config.teacher != "none" and not any(member.reads_teacher for member in members):
        names = ", ".join(sorted({member.name for member in members}))
        raise UserError(
            f"objective {names} ignores the teacher that was given: pass --tsft-teacher none"
        )
    for objective, data in zip(members, train, strict=True):
        try_objective(objective, config, data, len(members) > 1)
    if evaluation is not None:
        try_objective(plan.evaluation, config, evaluation, True)
    return plan


def _objective(flag: str, text: str) -> Objective:
    try:
        return objectives.parse(text)
    except (ValueError, TypeError) as error:
        raise UserError(f"{flag}: {error}") from error


def try_objective(
    objective: Objective, config: TsftConfig, data: PreparedData, may_ignore: bool
) -> None:
    """Raise UserError where the loss refuses this objective with the run's teacher and this data's
    weights.

    may_ignore: the teacher is there for another data set's objective, so this one need not read it.
    """
    one, weighted = torch.zeros(1, dtype=torch.int64), data.card.weighted
    given = config.teacher != "none" and (objective.reads_teacher or not may_ignore)
    if config.teacher == "cache":
        teacher: Any = TeacherTopK(one[:, None], torch.zeros(1, 1), label_logprobs=torch.zeros(1))
    else:
        teacher = torch.zeros(1, 2)
    try:
        for step in (0, LAST_STEP):  # a schedule may begin or end where no teacher is needed
            objective.set_step(step)
            q_target_cross_entropy(
                torch.zeros(1, 2),
                one,
                objective,
                teacher=teacher if given else None,
                token_weights=torch.ones(1) if weighted else None,
                sequence_ids=one,
                num_sequences=1,
            )
    except (ValueError, TypeError) as error:
        fix = (
            "--tsft-teacher reference gives it one"
            if config.teacher == "none"
            else "pass --tsft-teacher none"
        )
        if objective.requires_token_weights and not weighted:
            fix = (
                f"{data.directory}: give the JSONL rows `critical` spans or a `weight` and"
                " prepare them again"
            )
        raise UserError(f"{error} ({fix})") from error


def check_data(data: PreparedData, card: ModelCard) -> None:
    """Raise UserError where prepared data was made for another tokenizer or vocabulary than the
    model's."""
    theirs, ours = data.card.tokenizer_fingerprint, card.tokenizer_fingerprint
    if ours is not None and theirs != ours:
        raise UserError(
            f"{data.directory} was prepared with another tokenizer (fingerprint {theirs}) than the"
            f" model's ({ours}):"
            " run tools/prepare_data.py with the tokenizer of the model's Hugging Face folder"
        )
    if data.card.vocab_size > card.vocab_size:
        raise UserError(
            f"{data.directory} holds token id {data.card.vocab_size - 1}, the model's vocabulary"
            " ends at"
            f" {card.vocab_size - 1}: prepare the data with the model's own tokenizer"
        )


def resumes(given: Mapping[str, Any]) -> bool:
    """Whether --save holds a checkpoint, which then wins over where it started from: --load,
    --finetune."""
    save, load = given.get("save"), given.get("load")
    return bool(save) and load != save and (Path(save) / TRACKER).is_file()


def check_checkpoints(
    config: TsftConfig,
    card: ModelCard,
    given: Mapping[str, Any],
    *,
    engine: bool,
) -> tuple[Path, Resumed | None]:
    """Compare the weights that will be loaded with the model, key by key.

    Megatron itself loads a checkpoint that lacks keys of the model and reports success.

    Args:
        config: model.
        card: of the model.
        given: the flags on the command line.
        engine: the layers are Transformer Engine's.

    Returns:
        the base checkpoint's folder, and the checkpoint whose place in the data the run goes on
        from, or None.

    Raises:
        UserError: --load finds nothing, or a checkpoint is incomplete, without the optimizer state
            to resume from, saved by local layers and wanted by Transformer Engine's, or another
            model's.
    """
    base = latest_checkpoint(config.model)
    compare_keys(expected_keys(card), base)
    resumed: Resumed | None = None
    save, load = given.get("save"), given.get("load")
    if save and Path(save).resolve() == Path(config.model).resolve():
        raise UserError(
            f"--save {save} is the folder of --tsft-model: name another, or the imported model is"
            " lost"
        )
    resuming = resumes(given)
    if load and load != save and not resuming and not (Path(load) / TRACKER).is_file():
        raise UserError(
            f"--load {load}: there is no {TRACKER}; name a folder that a run saved to, or leave"
            " --load out"
        )
    load = save if resuming or not load else load
    for folder in dict.fromkeys(filter(None, (load, save))):
        if (Path(folder) / CARD_FILE).is_file() and ModelCard.load(folder) != card:
            raise UserError(
                f"{folder} belongs to another model than {config.model}: choose another --save or"
                " --load"
            )
    if load and (Path(load) / TRACKER).is_file():
        latest = latest_checkpoint(load, given.get("ckpt_step"))
        compare_keys(expected_keys(card), latest)
        fresh = not resuming and (given.get("finetune") or given.get("no_load_optim"))
        keys = read_metadata(latest).state_dict_metadata
        asked = (
            [key for key in extra_states(card) if "layernorm._extra_state" in key] if engine else []
        )
        lacking = [key for key in asked if key not in keys]
        if lacking:  # Megatron would stop at the first of them; the other way round it loads
            raise UserError(
                f"{latest} was saved by Megatron's local layers and lacks what Transformer"
                " Engine's ask for (e.g."
                f" {lacking[0]}): pass --transformer-impl local, or export it with"
                " tools/convert_checkpoint.py and"
                " import that (the optimizer's state stays behind)"
            )
        if (
            latest.name != "release"
            and not fresh
            and not any(key.startswith(("optimizer", "chained_")) for key in keys)
        ):
            raise UserError(
                f"{latest} was saved without optimizer state: pass --load {load} --finetune and"
                " another --save"
            )
        if latest.name != "release" and (resuming or not given.get("finetune")):
            resumed = Resumed(latest, load, vars(load_common_state_dict(str(latest))["args"]))
            if not fresh and card.megatron_arguments.get("num_experts"):
                _check_expert_optimizer(resumed, given)
    return base, resumed


def _check_expert_optimizer(resumed: Resumed, given: Mapping[str, Any]) -> None:
    """Raise UserError where experts are parallel in the run and not in the checkpoint, or the other
    way round.

    Megatron has a second optimizer for parallel experts, and cannot make two out of one
    (core/optimizer/optimizer.py, ChainedOptimizer.load_state_dict).
    """
    then, now = (of.get("expert_model_parallel_size", 1) for of in (resumed.before, given))
    if (then > 1) != (now > 1):
        raise UserError(
            f"{resumed.checkpoint} was saved with --expert-model-parallel-size {then}: its"
            " optimizer does not resume"
            f" with {now}. Pass {'one above 1' if then > 1 else '1'}, {resumed.anew}"
        )


def epochs_text(
    steps: int, packs_per_epoch: int, global_batch_size: int, share: float = 1.0
) -> str:
    """How long a run is, in words, for a data set that has a share of every step's packs."""
    per_epoch = packs_per_epoch / (global_batch_size * share)
    epochs = steps / per_epoch
    return f"{per_epoch:.4g} steps an epoch, {steps} steps are {epochs:.2f} epochs" + (
        "" if epochs >= 1 else f" ({math.ceil(epochs * 100)}% of the data)"
    )
