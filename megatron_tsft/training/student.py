"""Megatron's configuration of the model that is trained, with its teacher where one rides along."""

import argparse
import copy
from typing import Any

from megatron.training import get_args
from megatron.training.models.gpt import GPTModelConfig

from megatron_tsft.checkpoint.card import ModelCard
from megatron_tsft.errors import UserError
from megatron_tsft.model.auxiliary_losses import AuxiliaryScale, has_auxiliary_losses
from megatron_tsft.model.riding_teacher import GuidedModelConfig, RidingTeacher
from megatron_tsft.model.teacher_vocabulary import TeacherVocabulary
from megatron_tsft.plan.defaults import EXPERTS
from megatron_tsft.plan.plan import Plan
from megatron_tsft.plan.teachers.definition import Riding
from megatron_tsft.training.read_flags import parser_of
from megatron_tsft.training.start import model_config

# flags that split the student's layers unevenly: a teacher of other depth cannot follow them
UNEVEN = {
    "decoder_first_pipeline_num_layers": None,
    "decoder_last_pipeline_num_layers": None,
    "pipeline_model_parallel_layout": None,
    "account_for_embedding_in_pipeline_split": False,
    "account_for_loss_in_pipeline_split": False,
}


def student_config(plan: Plan, args: argparse.Namespace) -> GPTModelConfig:
    """Megatron's model configuration with packed attention and, if asked for, the riding teacher.

    Raises:
        UserError: Megatron refuses the combination of flags, or the teacher's layers do not divide.
    """
    riding = _riding_teacher(plan, args)
    config = model_config(args, GPTModelConfig if riding is None else GuidedModelConfig)
    # several packs in one row, and the teacher's share of what stages send, have shapes that
    # Megatron does not expect
    several = args.micro_batch_size > 1 or args.eval_micro_batch_size > 1
    varies = args.pipeline_model_parallel_size > 1 and (riding is not None or several)
    config.transformer.variable_seq_lengths = varies
    if riding is not None:
        riding.config.transformer.variable_seq_lengths = varies
        config.add_teacher(riding)
    if has_auxiliary_losses(config.transformer):
        config.transformer.moe_grad_scale_func = AuxiliaryScale(
            config.transformer, plan.packs, plan.batch.size, _consumed
        )
    return config


def _consumed() -> int:
    """Packs that the run has been trained on."""
    args: Any = get_args()
    return args.consumed_train_samples


def _riding_teacher(plan: Plan, args: argparse.Namespace) -> RidingTeacher | None:
    riding = plan.teacher.riding
    if riding is None:
        return None
    own = _frozen_arguments(args, plan.card, riding) if riding.folder else args
    vocabulary = TeacherVocabulary(riding.card.vocab_size, riding.token_map)
    return RidingTeacher(model_config(own), riding.checkpoint, vocabulary, plan.card.vocab_size)


def _frozen_arguments(
    args: argparse.Namespace, student: ModelCard, riding: Riding
) -> argparse.Namespace:
    """Megatron's arguments for the teacher's architecture in the student's layout.

    Raises:
        UserError: its layers do not divide over the pipeline's stages.
    """
    own, parser = copy.deepcopy(args), parser_of()
    theirs, ours = riding.card.megatron_arguments, student.megatron_arguments
    for name in ours.keys() - theirs.keys():
        setattr(own, name, parser.get_default(name))
    # where the student has experts, Megatron's flags about
    # them are the user's own choice, for the teacher's too
    choices = EXPERTS if theirs.get("num_experts") and not ours.get("num_experts") else {}
    for name, value in (theirs | choices).items():
        setattr(own, name, value)
    for name, value in UNEVEN.items():
        if getattr(args, name, None):
            setattr(own, name, value)
    stages = args.pipeline_model_parallel_size * (args.virtual_pipeline_model_parallel_size or 1)
    if own.num_layers % stages:
        raise UserError(
            f"the teacher {riding.folder} has {own.num_layers} layers, which do not divide over"
            f" {stages} pipeline stages: use another --pipeline-model-parallel-size, or cache the"
            " teacher"
        )
    return own
