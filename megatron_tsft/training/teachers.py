"""What must fit between a student and its teacher, and the teacher as the model or the data want
it."""

import copy
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_tsft.checkpoint.card import ModelCard
from megatron_tsft.checkpoint.folder import TRACKER, latest_checkpoint
from megatron_tsft.checkpoint.keys import compare_keys
from megatron_tsft.checkpoint.units import expected_keys
from megatron_tsft.data.prepared import PreparedData
from megatron_tsft.errors import UserError
from megatron_tsft.model.riding_teacher import RidingTeacher
from megatron_tsft.model.teacher_vocabulary import TeacherVocabulary
from megatron_tsft.teacher.reader import TeacherCache
from megatron_tsft.teacher.tokens import check_same_tokenizer, read_token_map
from megatron_tsft.training import arguments
from megatron_tsft.training.checks import heads_divide
from megatron_tsft.training.config import TsftConfig, option

# which flags mean something with which teacher
BELONGS = {
    "teacher_load": "model",
    "teacher_token_map": "model",
    "teacher_cache": "cache",
    "reference_refresh": "reference",
}
NEEDED = {"model": "teacher_load", "cache": "teacher_cache"}
# flags that split the student's layers unevenly: a teacher of other depth cannot follow them
UNEVEN = {
    "decoder_first_pipeline_num_layers": None,
    "decoder_last_pipeline_num_layers": None,
    "pipeline_model_parallel_layout": None,
    "account_for_embedding_in_pipeline_split": False,
    "account_for_loss_in_pipeline_split": False,
}


def check_teacher_flags(config: TsftConfig, given: Mapping[str, Any]) -> None:
    """Raise UserError for a teacher's flag that is missing, means nothing, or cannot work with
    another flag."""
    teacher = config.teacher
    if teacher in NEEDED and not getattr(config, NEEDED[teacher]):
        raise UserError(f"--tsft-teacher {teacher} needs {option(NEEDED[teacher])} DIR")
    for field, belongs in BELONGS.items():
        if getattr(config, field) and teacher != belongs:
            raise UserError(
                f"{option(field)} belongs to --tsft-teacher {belongs}, which is {teacher}: leave"
                " one out"
            )
    if teacher in ("reference", "model") and given.get("moe_token_dispatcher_type") == "allgather":
        raise UserError(
            f"--tsft-teacher {teacher} makes stages send shapes of their own, which"
            " --moe-token-dispatcher-type"
            " allgather does not take: leave the flag out"
        )
    if "tsft_teacher_tail" in given and teacher != "cache":
        raise UserError(
            f"--tsft-teacher-tail belongs to --tsft-teacher cache, which is {teacher}: leave one"
            " out"
        )
    refresh = config.reference_refresh
    if refresh < 0:
        raise UserError(f"--tsft-reference-refresh {refresh}: pass a number of steps, at least 1")
    if refresh:
        check_refresh(refresh, given)


def check_refresh(refresh: int, given: Mapping[str, Any]) -> None:
    """Raise UserError where the reference of --tsft-reference-refresh could not be had, or not
    again on resume."""
    if given.get("overlap_param_gather"):
        raise UserError(
            "--tsft-reference-refresh copies the weights before the first layer runs, when"
            " --overlap-param-gather may"
            " still be gathering them: leave one of them out"
        )
    if given.get("finetune"):
        raise UserError(
            "--tsft-reference-refresh with --finetune: the first steps' reference could not be had"
            " again on resume;"
            " export the weights, import them, and pass them as --tsft-model"
        )
    every = given.get("save_interval", arguments.SAVE_INTERVAL)
    if given.get("save") and every % refresh and refresh % every:
        raise UserError(
            f"--save-interval {every} and --tsft-reference-refresh {refresh}: one must be a"
            " multiple of the other, so"
            " that a resumed run finds the weights that were the reference"
        )


def load_caches(config: TsftConfig, card: ModelCard) -> list[TeacherCache]:
    """Open the caches of --tsft-teacher-cache; the ranks of a node share the reading of every byte.

    Raises:
        UserError: a cache is damaged, or has ids outside the model's vocabulary.
    """
    share = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    caches = [TeacherCache.load(directory) for directory in config.teacher_cache]
    for cache in caches:
        total = sum(facts["bytes"] for facts in cache.card.shards.values()) // share[1]
        what, quiet = f"checking {cache.directory}", share[0] > 0
        with tqdm(
            total=total, desc=what, unit="B", unit_scale=True, file=sys.stderr, disable=quiet
        ) as bar:
            try:
                vocab_size = min(cache.card.identity.vocab_size, card.vocab_size)
                cache.verify(bar.update, share=share, vocab_size=vocab_size)
            except UserError as error:
                error.met_here_alone = True
                raise
    return caches


def riding_teacher(
    config: TsftConfig,
    student: ModelCard,
    base: Path,
    args: Any,
    given: Mapping[str, Any],
    data: Sequence[PreparedData],
) -> RidingTeacher | None:
    """The frozen model that rides along, or None.

    Raises:
        UserError: the teacher's checkpoint, tokenizer or architecture does not fit.
    """
    if config.teacher == "reference":
        card, checkpoint = student, reference_checkpoint(config, base, args, given)
    elif config.teacher == "model":
        card, checkpoint = (
            ModelCard.load(config.teacher_load),
            latest_checkpoint(config.teacher_load),
        )
        compare_keys(expected_keys(card), checkpoint)
        if not config.teacher_token_map:
            flag = "pass a --tsft-teacher-token-map"
            check_same_tokenizer(config.teacher_load, card.tokenizer_fingerprint, data, flag)
            for part in data:
                if part.card.vocab_size > card.vocab_size:
                    raise UserError(
                        f"{part.directory} holds token id {part.card.vocab_size - 1}, the"
                        " vocabulary of the teacher"
                        f" {config.teacher_load} ends at {card.vocab_size - 1}: use another teacher"
                    )
    else:
        return None
    token_map = None
    if config.teacher_token_map:
        token_map = read_token_map(
            config.teacher_token_map, student.vocab_size, card.vocab_size, data
        )
    vocabulary = TeacherVocabulary(card.vocab_size, token_map)
    model = (
        frozen_arguments(args, student, card, config.teacher_load)
        if config.teacher == "model"
        else args
    )
    return RidingTeacher(arguments.model_config(model), checkpoint, vocabulary, student.vocab_size)


def reference_checkpoint(
    config: TsftConfig, base: Path, args: Any, given: Mapping[str, Any]
) -> Path:
    """The weights that are the reference when a run starts or goes on.

    Raises:
        UserError: with --tsft-reference-refresh, the weights of the last refresh were not kept.
    """
    if not config.reference_refresh or not args.load or not (Path(args.load) / TRACKER).is_file():
        return base
    text = (
        (Path(args.load) / TRACKER).read_text().strip()
        if args.ckpt_step is None
        else str(args.ckpt_step)
    )
    step = int(text) if text.isdecimal() else 0
    over = step >= (args.train_iters or step + 1)
    last = step - step % config.reference_refresh
    if last == step and not over:
        return base  # the next micro-batch takes the student's weights
    if last == step:  # no micro-batch comes, but an evaluation: by the reference of the last step
        last -= config.reference_refresh
    if last <= 0:
        return base
    for folder in filter(
        None, (args.load, given.get("load"))
    ):  # the run before this one may have kept them
        if (Path(folder) / f"iter_{last:07d}").is_dir():
            return latest_checkpoint(folder, last)
    if over:
        args.eval_iters = 0  # the evaluation that the run ended with stays
        return base
    raise UserError(
        f"the reference of step {step} is the weights of step {last}, which {args.load} has no"
        " longer: resume"
        f" from a step that is a multiple of {config.reference_refresh} (--ckpt-step), or keep"
        " checkpoints"
    )


def frozen_arguments(args: Any, student: ModelCard, card: ModelCard, folder: str) -> Any:
    """Megatron's arguments for the teacher's architecture in the student's layout.

    Raises:
        UserError: its heads do not divide over the tensor-parallel ranks, or its layers over the
            pipeline's stages.
    """
    parallel, experts = (
        args.expert_model_parallel_size,
        card.megatron_arguments.get("num_experts") or 0,
    )
    if parallel > 1 and (not experts or experts % parallel):
        raise UserError(
            f"the teacher {folder} has {experts} experts, which do not divide over"
            " --expert-model-parallel-size"
            f" {parallel}: use 1, or cache the teacher"
        )
    own = copy.deepcopy(args)
    parser = arguments.parser_of()
    for name in student.megatron_arguments.keys() - card.megatron_arguments.keys():
        setattr(own, name, parser.get_default(name))
    # where the student has experts, Megatron's flags about them are the user's own choice, for the
    # teacher's too
    choices = (
        arguments.EXPERTS if experts and not student.megatron_arguments.get("num_experts") else {}
    )
    for name, value in (card.megatron_arguments | choices).items():
        setattr(own, name, value)
    for name, value in UNEVEN.items():
        if getattr(args, name, None):
            setattr(own, name, value)
    tp, pp = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    chunks = pp * (args.virtual_pipeline_model_parallel_size or 1)
    heads, groups, layers = own.num_attention_heads, own.num_query_groups, own.num_layers
    if not heads_divide(heads, groups, tp):
        raise UserError(
            f"the teacher {folder} has {heads} attention heads and {groups} key-value groups, which"
            f" --tensor-model-parallel-size {tp} does not divide: use another size, or cache the"
            " teacher"
        )
    if layers % chunks:
        raise UserError(
            f"the teacher {folder} has {layers} layers, which do not divide over {chunks} pipeline"
            " stages: use another"
            " --pipeline-model-parallel-size, or cache the teacher"
        )
    return own
