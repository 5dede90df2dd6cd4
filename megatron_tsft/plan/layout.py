"""How the ranks share the model and the batch: what must divide what."""

from dataclasses import dataclass

from megatron_tsft.checkpoint.card import ModelCard
from megatron_tsft.errors import UserError
from megatron_tsft.plan.flags import Flags


@dataclass(frozen=True)
class Batch:
    """Packs of a step, over all ranks: in training, and in an evaluation."""

    size: int
    evaluation: int


def heads_divide(heads: int, groups: int, tp: int) -> bool:
    """Whether attention heads and key-value groups divide over `tp` tensor-parallel ranks; few
    groups are repeated."""
    return heads % tp == 0 and (groups % tp == 0 or tp % groups == 0)


def uneven(flags: Flags) -> bool:
    """Whether the layers are divided over the pipeline's stages by a flag of their own."""
    return any(
        (
            flags.decoder_first_pipeline_num_layers is not None,
            flags.decoder_last_pipeline_num_layers is not None,
            flags.pipeline_model_parallel_layout is not None,
            flags.account_for_embedding_in_pipeline_split,
            flags.account_for_loss_in_pipeline_split,
        )
    )


def check_layout(flags: Flags, card: ModelCard, ranks: int) -> Batch:
    """The batch; raises UserError where the layout does not divide the model, the batch or the
    ranks."""
    _check_model(flags, card)
    _check_ranks(flags, card, ranks)
    micro = flags.micro_batch_size
    assert micro is not None  # check_required
    parallel = _model_ranks(flags)
    dp = ranks // parallel
    size = flags.global_batch_size or micro * dp
    if size % (micro * dp):
        raise UserError(
            f"--global-batch-size {size} is not a multiple of --micro-batch-size {micro} x {dp}"
            " data-parallel ranks"
        )
    longest = card.megatron_arguments["max_position_embeddings"]
    if flags.pack_length > longest:
        raise UserError(
            f"--seq-length {flags.pack_length} exceeds the model's {longest} positions: use at most"
            " that"
        )
    return Batch(size, flags.eval_global_batch_size or size)


def _model_ranks(flags: Flags) -> int:
    """Ranks that hold one copy of the model together."""
    return (
        flags.tensor_model_parallel_size
        * flags.pipeline_model_parallel_size
        * flags.context_parallel_size
    )


def _check_model(flags: Flags, card: ModelCard) -> None:
    """Raise UserError where heads or layers do not divide over the ranks."""
    model = card.megatron_arguments
    tp, pp = flags.tensor_model_parallel_size, flags.pipeline_model_parallel_size
    heads, groups = model["num_attention_heads"], model["num_query_groups"]
    if not heads_divide(heads, groups, tp):
        fit = [n for n in range(1, heads + 1) if heads_divide(heads, groups, n)]
        raise UserError(
            f"--tensor-model-parallel-size {tp} does not divide the model's {heads} attention heads"
            f" and {groups} key-value groups: use one of {', '.join(map(str, fit))}"
        )
    layers = model["num_layers"]
    if layers % pp and not uneven(flags):
        fit = [n for n in range(1, layers + 1) if layers % n == 0]
        raise UserError(
            f"--pipeline-model-parallel-size {pp} does not divide {layers} layers: use one of"
            f" {fit}, or --decoder-first-pipeline-num-layers for an uneven split"
        )


def _check_ranks(flags: Flags, card: ModelCard, ranks: int) -> None:
    """Raise UserError where the processes are no multiple of what the model is divided over."""
    tp, pp = flags.tensor_model_parallel_size, flags.pipeline_model_parallel_size
    cp, parallel = flags.context_parallel_size, _model_ranks(flags)
    if ranks % parallel:
        context = f" x context {cp}" if cp > 1 else ""
        raise UserError(
            f"{ranks} processes are not a multiple of tensor {tp} x pipeline {pp}{context}: start"
            f" {parallel}"
        )
    _check_experts(flags, card.megatron_arguments.get("num_experts"), ranks)


def _check_experts(flags: Flags, experts: int | None, ranks: int) -> None:
    """Raise UserError where --expert-model-parallel-size does not divide the experts or the
    ranks."""
    parallel = flags.expert_model_parallel_size
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
    expert_tp = flags.expert_tensor_parallel_size or flags.tensor_model_parallel_size
    needed = parallel * expert_tp * flags.pipeline_model_parallel_size
    if ranks % needed:
        raise UserError(
            f"{ranks} processes are not a multiple of {needed}, which expert parallel {parallel} x"
            f" expert tensor {expert_tp} x pipeline parallel need: start {needed}"
            + (", or pass --expert-tensor-parallel-size 1" if expert_tp > 1 else "")
        )
