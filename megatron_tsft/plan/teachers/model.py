"""Another model of the same tokenizer, of any depth and width, frozen."""

from megatron_tsft.checkpoint.card import ModelCard
from megatron_tsft.checkpoint.folder import latest_checkpoint
from megatron_tsft.checkpoint.keys import compare_keys
from megatron_tsft.checkpoint.units import expected_keys
from megatron_tsft.errors import UserError
from megatron_tsft.plan.checked import check_weights
from megatron_tsft.plan.config import TsftConfig
from megatron_tsft.plan.flags import Flags
from megatron_tsft.plan.layout import heads_divide
from megatron_tsft.plan.teachers.definition import Kind, Request, Riding, Teacher, identity_of
from megatron_tsft.plan.teachers.reference import check_shapes
from megatron_tsft.teacher.tokens import check_same_tokenizer, read_token_map, token_map_hash


def _check(config: TsftConfig, flags: Flags) -> None:
    check_shapes("model", flags)


def _find(request: Request) -> Teacher:
    config, student = request.config, request.student
    folder = config.teacher_load
    card, checkpoint = ModelCard.load(folder), latest_checkpoint(folder)
    check_weights(folder, checkpoint, config.verify, request.ranks)
    compare_keys(expected_keys(card), checkpoint)
    _check_layout(request.flags, card, folder)
    token_map = None
    if config.teacher_token_map:
        sizes = student.vocab_size, card.vocab_size
        token_map = read_token_map(config.teacher_token_map, *sizes, request.data)
    else:
        _check_tokens(request, card, folder)
    mapped = "" if token_map is None else token_map_hash(token_map)
    identity = identity_of("model", checkpoint, card, mapped)
    return Teacher("model", folder, identity, riding=Riding(card, checkpoint, folder, token_map))


def _check_tokens(request: Request, card: ModelCard, folder: str) -> None:
    """Raise UserError where the teacher's tokens are others than the data's."""
    remedy = "pass a --tsft-teacher-token-map"
    check_same_tokenizer(folder, card.tokenizer_fingerprint, request.data, remedy)
    for part in request.data:
        if part.card.vocab_size > card.vocab_size:
            raise UserError(
                f"{part.directory} holds token id {part.card.vocab_size - 1}, the vocabulary of the"
                f" teacher {folder} ends at {card.vocab_size - 1}: use another teacher"
            )


def _check_layout(flags: Flags, card: ModelCard, folder: str) -> None:
    """Raise UserError where the teacher's heads or experts do not divide over the student's ranks.

    Its layers are looked at where the number of virtual stages is known, after Megatron's parser.
    """
    model = card.megatron_arguments
    parallel, experts = flags.expert_model_parallel_size, model.get("num_experts") or 0
    if parallel > 1 and (not experts or experts % parallel):
        raise UserError(
            f"the teacher {folder} has {experts} experts, which do not divide over"
            f" --expert-model-parallel-size {parallel}: use 1, or cache the teacher"
        )
    tp, heads = flags.tensor_model_parallel_size, model["num_attention_heads"]
    groups = model["num_query_groups"]
    if not heads_divide(heads, groups, tp):
        raise UserError(
            f"the teacher {folder} has {heads} attention heads and {groups} key-value groups, which"
            f" --tensor-model-parallel-size {tp} does not divide: use another size, or cache the"
            " teacher"
        )


KIND = Kind(
    "model",
    "another model of --tsft-teacher-load, frozen",
    _find,
    fields=("teacher_load", "teacher_token_map"),
    needed="teacher_load",
    check=_check,
)
