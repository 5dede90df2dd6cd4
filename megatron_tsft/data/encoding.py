"""How rows become tokens: what decides it for all of a job, and what becomes of a block of rows."""

import contextlib
import datetime
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from megatron_tsft.data import formats
from megatron_tsft.data.chat import ChatEncoder, Encoded, Planned
from megatron_tsft.data.prepared import sample_id
from megatron_tsft.data.source import Block, decode
from megatron_tsft.data.turns import Refusal
from megatron_tsft.data.written import ChatOptions
from megatron_tsft.errors import UserError

TOO_LONG = ("truncate", "refuse")


@dataclass(frozen=True)
class Encoding(ChatOptions):
    """How rows become tokens; the same for all of a job, and kept in its card.

    Attributes:
        format: one of formats.FORMATS; "" is detected from the first rows.
        columns: ours -> the file's.
    """

    format: str = ""
    columns: dict[str, str] = field(default_factory=dict[str, str])

    def dated(self) -> "Encoding":
        """With today where no date is given, one for the whole job.

        Raises:
            UserError: the date is none.
        """
        if not self.date:
            return replace(self, date=datetime.date.today().isoformat())
        try:
            return replace(self, date=datetime.date.fromisoformat(self.date).isoformat())
        except ValueError as error:
            raise UserError(f"--date {self.date}: give a day as YYYY-MM-DD") from error

    def template(self, tokenizer: Any) -> str | None:
        """The text of the chat template, where there is one for all rows."""
        own = tokenizer.chat_template
        return self.chat_template or (own if isinstance(own, str) else None)

    def made_with(self) -> dict[str, Any]:
        """What differs from the defaults, for the card, which keeps template and date itself."""
        plain = Encoding(chat_template=self.chat_template, date=self.date)
        return {key: value for key, value in vars(self).items() if value != getattr(plain, key)}


@dataclass(frozen=True)
class Job:
    """What every process does with a row; the first fields are those of `prepare`."""

    tokenizer_dir: str
    max_tokens: int | None
    too_long: str
    encoding: Encoding
    trust: bool = False  # whether the tokenizer may run Python of its own


@dataclass(frozen=True)
class Outcome:
    """What became of one row.

    Attributes:
        number: its place in the input.
        encoded: the conversation, None where it is refused.
        group: 64 bits over the first conversation of its row, before it is cut: equal rows, and the
            conversations of one row, are of one group.
        reason, detail: of a refusal; the detail where it is known.
    """

    number: int | str
    encoded: Encoded | None
    group: int = 0
    reason: str = ""
    detail: str = ""


def encode_block(encoder: ChatEncoder, job: Job, block: Block) -> list[Outcome]:
    """The outcomes of a block's rows, in order; a row that becomes several conversations has
    several.

    Raises:
        UserError: no row can be encoded with this tokenizer.
    """
    planned = plan_block(encoder, job, block)
    return finish_block(encoder, job, block, planned, encoder.tokenise(planned))


def plan_block(encoder: ChatEncoder, job: Job, block: Block) -> Planned:
    """A block's rows as texts."""
    with _naming(block):
        return encoder.plan(_decoded(row, job.encoding) for _, row in block.rows)


def finish_block(
    encoder: ChatEncoder, job: Job, block: Block, planned: Planned, encodings: list[Any]
) -> list[Outcome]:
    """The outcomes of a block that was planned and tokenised."""
    outcomes: list[Outcome] = []
    with _naming(block):
        encoded_rows = encoder.finish(planned, encodings)
    for (number, _), found in zip(block.rows, encoded_rows, strict=True):
        if isinstance(found, Refusal):
            outcomes.append(Outcome(number, None, reason=found.reason, detail=found.detail))
            continue
        group = int(sample_id(found[0].input_ids, found[0].loss_mask)[:16], 16)
        outcomes += [_fitted(Outcome(number, encoded, group), job) for encoded in found]
    return outcomes


@contextlib.contextmanager
def _naming(block: Block) -> Iterator[None]:
    """What is raised inside says which rows it was about."""
    try:
        yield
    except Exception as error:
        if block.rows:
            error.add_note(f"in {block.rows[0][0]} to {block.rows[-1][0]} of the input")
        raise


def _decoded(row: Any, encoding: Encoding) -> dict[str, Any] | Refusal:
    try:
        return formats.made(decode(row), encoding.format, encoding.columns)
    except Refusal as refusal:
        return refusal


def _fitted(outcome: Outcome, job: Job) -> Outcome:
    """A conversation within --max-tokens."""
    limit, encoded = job.max_tokens, outcome.encoded
    if limit is None or encoded is None or len(encoded.input_ids) <= limit:
        return outcome
    if job.too_long == "refuse":
        return Outcome(outcome.number, None, reason=f"longer than --max-tokens {limit}")
    encoded = encoded.cut(limit)
    if not encoded.loss_mask.any():
        reason = f"no supervised token within --max-tokens {limit}"
        return Outcome(outcome.number, None, reason=reason)
    return replace(outcome, encoded=encoded)
