"""What a teacher is to be asked about some data, checked: a cache's identity and plan."""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_tsft.data.prepared import PreparedData
from megatron_tsft.errors import UserError
from megatron_tsft.teacher.folder import TeacherFolder
from megatron_tsft.teacher.format import CacheIdentity
from megatron_tsft.teacher.plan import CachePlan, plan_cache
from megatron_tsft.teacher.tokens import check_same_tokenizer, read_token_map, token_map_hash


@dataclass(frozen=True)
class Question:
    """What is asked at every supervised position.

    Attributes:
        top_k: that many of the most likely tokens.
        temperature: records are of softmax(z / temperature).
        vocab_size: ids at or beyond it get no mass.
        token_map: the teacher's id of each token of the data's vocabulary, -1 for none; None where
            they are equal.
        batch_tokens: positions that go through the teacher at once.
    """

    top_k: int
    temperature: float
    vocab_size: int
    token_map: Sequence[int] | None
    batch_tokens: int


@dataclass(frozen=True)
class CacheJob:
    """A cache to be made: whose, of what, and in which shards."""

    folder: TeacherFolder
    question: Question
    identity: CacheIdentity
    plan: CachePlan


def plan_job(
    folder: TeacherFolder,
    data: Sequence[PreparedData],
    *,
    top_k: int,
    temperature: float,
    dtype: str,
    batch_tokens: int,
    vocab_size: int | None = None,
    token_map_file: str | None = None,
    shard_bytes: int | None = None,
) -> CacheJob:
    """Check that a teacher can be asked about some data.

    Args:
        folder: the teacher's.
        data: the prepared data sets.
        top_k, temperature, batch_tokens: as in Question.
        dtype: the teacher's, "fp32", "bf16" or "fp16".
        vocab_size: leave ids from it on out; None is the teacher's own vocabulary.
        token_map_file: for a teacher of another tokenizer.
        shard_bytes: of a file; None lets the data's size decide.

    Raises:
        UserError: another tokenizer, a vocabulary that does not hold the data, or a conversation
            that is longer than the teacher's context.
    """
    fingerprint = data[0].card.tokenizer_fingerprint
    for part in data[1:]:
        if part.card.tokenizer_fingerprint != fingerprint:
            raise UserError(
                f"{part.directory} and {data[0].directory} were prepared with different tokenizers:"
                " make a cache of each"
            )
    token_map, size = None, folder.vocab_size if vocab_size is None else vocab_size
    if token_map_file:
        if vocab_size is None:
            raise UserError("--token-map needs --vocab-size N, the student's vocabulary")
        token_map = read_token_map(token_map_file, vocab_size, folder.vocab_size, data)
    else:
        _check_tokens(folder, data, size)
    question = Question(min(top_k, size), temperature, size, token_map, batch_tokens)
    identity = CacheIdentity(
        teacher=folder.path.resolve().name,
        teacher_hash=folder.weights_hash,
        tokenizer_fingerprint=fingerprint,
        vocab_size=size,
        top_k=question.top_k,
        temperature=temperature,
        dtype=dtype,
        data=[part.card.fingerprint for part in data],
        token_map=None if token_map is None else token_map_hash(token_map),
    )
    plan = plan_cache(data, question.top_k, shard_bytes)
    _check_positions(folder, int(plan.lengths.max()))
    return CacheJob(folder, question, identity, plan)


def _check_tokens(folder: TeacherFolder, data: Sequence[PreparedData], size: int) -> None:
    """Raise UserError where the data's tokens are not the teacher's."""
    remedy = "pass a --token-map"
    check_same_tokenizer(str(folder.path), folder.tokenizer, data, remedy)
    if size > folder.vocab_size:
        raise UserError(
            f"--vocab-size {size}: the teacher's vocabulary is {folder.vocab_size}, pass at most"
            " that"
        )
    largest = max(part.card.vocab_size for part in data)
    if largest > size:
        raise UserError(
            f"the data holds token id {largest - 1}, beyond a vocabulary of {size}: pass a larger"
            " one"
        )


def _check_positions(folder: TeacherFolder, longest: int) -> None:
    """Raise UserError where a conversation without its last token exceeds the teacher's context."""
    if folder.positions is not None and longest > folder.positions + 1:
        raise UserError(
            f"a conversation has {longest} tokens, the teacher knows {folder.positions} positions:"
            f" prepare the data with --max-tokens {folder.positions}"
        )
