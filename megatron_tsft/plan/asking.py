"""The plan of a job that only asks a teacher: its layout and its precision, checked as a run's
are."""

from collections.abc import Sequence
from typing import Any

from megatron_tsft.checkpoint.card import ModelCard
from megatron_tsft.checkpoint.mapping import padded_vocab_size
from megatron_tsft.errors import UserError
from megatron_tsft.plan import defaults
from megatron_tsft.plan.command_line import CommandLine
from megatron_tsft.plan.flags import Flags
from megatron_tsft.plan.layout import check_layout
from megatron_tsft.plan.plan import Startup
from megatron_tsft.plan.precision import check_precision
from megatron_tsft.plan.refused import check_refused_flags

A_WEEK = 7 * 24 * 60  # minutes: a rank that is done waits for the others' last shards


def asking_argv(
    flags: Sequence[str], card: ModelCard, dtype: str, batch_tokens: int
) -> tuple[str, ...]:
    """Megatron's command line for a model that is not trained.

    Args:
        flags: the user's, such as --tensor-model-parallel-size 2.
        card: the teacher's.
        dtype: "fp32", "bf16" or "fp16".
        batch_tokens: positions of a pack.
    """
    length = min(batch_tokens, card.megatron_arguments["max_position_embeddings"])
    words = ["--micro-batch-size", "1", "--seq-length", str(length), "--train-iters", "1"]
    words += ["--lr", "1e-6", "--no-load-optim", "--no-load-rng"]
    return (*flags, *words, *([] if dtype == "fp32" else [f"--{dtype}"]))


def plan_asking(
    line: CommandLine, folder: str, card: ModelCard, device: str, vocab_size: int
) -> Startup:
    """What Megatron is started with.

    Args:
        line: a command line of `asking_argv`.
        folder: the teacher's.
        card: its card.
        device: "cuda" or "cpu".
        vocab_size: of the records.

    Raises:
        UserError: the layout does not fit the model, or a flag has no meaning here.
    """
    check_refused_flags(line)
    defaults.check_card(line, card, folder)
    assumed: dict[str, Any] = defaults.parser_defaults(card, folder, device, line.given)
    flags = Flags.of(line.given, assumed)
    check_layout(flags, card, line.ranks.size)
    parallel = max(flags.expert_model_parallel_size, flags.context_parallel_size)
    if parallel > 1 or flags.virtual_stages:
        raise UserError(
            "a teacher is cached without expert and context parallelism and virtual pipeline"
            " stages: leave them out"
        )
    check_precision(flags, device, engine=defaults.engine_installed())
    multiple = card.make_vocab_size_divisible_by * flags.tensor_model_parallel_size
    assumed["padded_vocab_size"] = padded_vocab_size(vocab_size, multiple)
    assumed["distributed_timeout_minutes"] = A_WEEK
    return Startup(line.argv, assumed, {}, quiet=True)
