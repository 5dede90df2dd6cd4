"""The preparation job: rows of the input -> tokens, in processes -> a prepared folder."""

import contextlib
import datetime
import multiprocessing
import os
import threading
from collections import Counter, defaultdict, deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from megatron_tsft.atomic import new_directory
from megatron_tsft.checkpoint.tokenizer import load_tokenizer, tokenizer_fingerprint
from megatron_tsft.data import formats
from megatron_tsft.data.chat import ChatEncoder, Encoded
from megatron_tsft.data.prepared import CARD_FILE, DataCard
from megatron_tsft.data.rows import check_variables
from megatron_tsft.data.source import Block, Source, decode, open_source
from megatron_tsft.data.turns import Refusal
from megatron_tsft.data.writer import PreparedWriter
from megatron_tsft.data.written import ChatOptions
from megatron_tsft.errors import UserError

TOO_LONG = ("truncate", "refuse")
PRELOAD = ["__main__", "megatron_tsft.data.prepare", "transformers.models.auto.tokenization_auto"]
LINES_KEPT = 5  # first line numbers of each reason
MAX_REFUSED = 0.1


@dataclass(frozen=True)
class Job:
    """What every process does with a row; the fields are `prepare`'s arguments."""

    tokenizer_dir: str
    max_tokens: int | None
    too_long: str
    encoding: "Encoding"


@dataclass(frozen=True)
class Encoding:
    """How rows become tokens; the same for all of a job, and kept in its card.

    Attributes:
        chat_template: a file of Jinja text in place of the tokenizer's own template.
        variables: `chat_template_kwargs` of every row.
        date: the day that templates are told, YYYY-MM-DD.
        history_thinking, supervise: of ChatOptions.
        format: one of formats.FORMATS; "" is detected from the first rows.
        columns: ours -> the file's.
    """

    chat_template: str | None = None
    variables: dict[str, Any] = field(default_factory=dict[str, Any])
    date: str = ""
    history_thinking: str = "template"
    supervise: str = "all"
    format: str = ""
    columns: dict[str, str] = field(default_factory=dict[str, str])

    def template(self, tokenizer: Any) -> str | None:
        """The text of the chat template, where there is one for all rows.

        Raises:
            UserError: its file cannot be read.
        """
        if self.chat_template is None:
            own = tokenizer.chat_template
            return own if isinstance(own, str) else None
        try:
            return Path(self.chat_template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"--chat-template {self.chat_template} cannot be read: {error}"
            ) from error

    def encoder(self, tokenizer: Any) -> ChatEncoder:
        """Raises UserError: the template's file cannot be read."""
        options = ChatOptions(
            None if self.chat_template is None else self.template(tokenizer),
            self.variables,
            datetime.date.fromisoformat(self.date).strftime,
            self.history_thinking,
            self.supervise,
        )
        return ChatEncoder(tokenizer, options)

    def made_with(self) -> dict[str, Any]:
        """What differs from the defaults, for the card."""
        plain = Encoding(date=self.date)
        return {key: value for key, value in vars(self).items() if value != getattr(plain, key)}


@dataclass(frozen=True)
class Outcome:
    """What became of one row: `encoded`, or None, the reason and, where known, its detail."""

    number: int | str
    encoded: Encoded | None
    truncated: bool = False
    reason: str = ""
    detail: str = ""


def encode_block(encoder: ChatEncoder, job: Job, block: Block) -> list[Outcome]:
    """The outcomes of a block's rows, in order; a row that becomes several conversations has
    several.

    Raises:
        UserError: no row can be encoded with this tokenizer.
    """
    outcomes: list[Outcome] = []
    numbers = [number for number, _ in block.rows]
    rows = [_decoded(row, job.encoding) for _, row in block.rows]
    try:
        encoded_rows = encoder.encode_rows(rows)
    except Exception as error:
        if numbers:
            error.add_note(f"in {numbers[0]} to {numbers[-1]} of the input")
        raise
    for number, found in zip(numbers, encoded_rows, strict=True):
        if isinstance(found, Refusal):
            outcomes.append(Outcome(number, None, reason=found.reason, detail=found.detail))
            continue
        outcomes += [_fitted(number, encoded, job) for encoded in found]
    return outcomes


def _decoded(row: Any, encoding: Encoding) -> dict[str, Any] | Refusal:
    try:
        return formats.made(decode(row), encoding.format, encoding.columns)
    except Refusal as refusal:
        return refusal


def _fitted(number: int | str, encoded: Encoded, job: Job) -> Outcome:
    """A conversation within --max-tokens."""
    limit = job.max_tokens
    if limit is None or len(encoded.input_ids) <= limit:
        return Outcome(number, encoded)
    if job.too_long == "refuse":
        return Outcome(number, None, reason=f"longer than --max-tokens {limit}")
    encoded = encoded.cut(limit)
    if not encoded.loss_mask.any():
        return Outcome(number, None, reason=f"no supervised token within --max-tokens {limit}")
    return Outcome(number, encoded, truncated=True)


def prepare(
    source: Path | str | Sequence[Path | str],
    tokenizer_dir: Path | str,
    output: Path | str,
    *,
    max_tokens: int | None = None,
    too_long: str = "truncate",
    workers: int = 1,
    overwrite: bool = False,
    strict: bool = False,
    max_refused: float = MAX_REFUSED,
    encoding: Encoding | None = None,
    progress: bool = True,
) -> DataCard:
    """Write the prepared folder `output`; equal inputs give equal folders, whatever the number of
    workers.

    Args:
        source: one or several of the kinds of source.py; the keys of a row: rows.py, formats.py.
        tokenizer_dir: a local Hugging Face folder.
        output: a new or empty folder, or with `overwrite` a prepared one.
        max_tokens: the longest conversation, None for any.
        too_long: "truncate" cuts longer ones, which lose their end token, and counts them; "refuse"
            leaves them out.
        workers: processes that tokenise.
        strict: stop at the first refused row.
        max_refused: the largest share of rows that may be refused.
        encoding: see Encoding; without a date it is today.

    Raises:
        UserError: bad arguments, an input that cannot be read, no conversation that can be used, or
            with `strict` one that cannot.
    """
    from tqdm import tqdm

    output, encoding = Path(output), _dated(encoding or Encoding())
    _check_options(max_tokens, too_long, workers, max_refused, encoding)
    rows = open_source(source)
    _check_output(output, [*(part.path for part in rows.parts), Path(tokenizer_dir)], overwrite)
    if not encoding.format:
        found = formats.detect(rows.first_rows(), encoding.columns, str(rows))
        encoding = replace(encoding, format=found)
    tokenizer = load_tokenizer(tokenizer_dir)
    encoder = encoding.encoder(tokenizer)
    job = Job(str(tokenizer_dir), max_tokens, too_long, encoding)
    refused, truncated = _Refused(rows), 0
    with (
        new_directory(output, overwrite=overwrite) as folder,
        tqdm(
            total=rows.total,
            unit="B",
            unit_scale=True,
            desc="tokenising",
            disable=not progress,
        ) as bar,
        contextlib.closing(_outcomes(rows, encoder, job, workers)) as results,
        contextlib.closing(PreparedWriter(folder)) as writer,
    ):
        for outcomes, done in results:
            for outcome in outcomes:
                if outcome.encoded is None:
                    refused.add(outcome, strict=strict)
                else:
                    writer.add(outcome.encoded)
                    truncated += outcome.truncated
            bar.update(done - bar.n)
        refused.check(writer.conversations, max_refused)
        return writer.finish(
            tokenizer_fingerprint(tokenizer),
            progress=progress,
            truncated=truncated,
            refused=dict(refused.counts),
            refused_lines=dict(refused.places),
            date=encoding.date,
            made_with=encoding.made_with(),
            turn_ends={
                tokenizer.convert_ids_to_tokens(end): [end, count]
                for end, count in sorted(writer.ends.items())
            },
            chat_template=encoding.template(tokenizer) if writer.templated else None,
        )


class _Refused:
    """The rows that cannot be used: how many for each reason, and where the first of them are."""

    def __init__(self, rows: Source) -> None:
        self._rows = rows
        self.counts = Counter[str]()
        self.places = defaultdict[str, list[int | str]](list)

    def add(self, outcome: Outcome, *, strict: bool) -> None:
        """Raises UserError where `strict`."""
        if strict:
            detail = f" ({outcome.detail})" if outcome.detail else ""
            where = f"{self._rows}, {self._rows.noun} {outcome.number}"
            raise UserError(f"{where}: {outcome.reason}{detail}")
        self.counts[outcome.reason] += 1
        if len(self.places[outcome.reason]) < LINES_KEPT:
            self.places[outcome.reason].append(outcome.number)

    def check(self, conversations: int, most: float) -> None:
        """Raises UserError where no conversation is left, or more than the share `most` is not."""
        count = self.counts.total()
        reasons = "; ".join(
            f"{reason} ({n}, the first in {self._rows.noun} {self.places[reason][0]})"
            for reason, n in self.counts.most_common()
        )
        if not conversations:
            because = f"refused: {reasons}" if reasons else "it is empty"
            raise UserError(f"{self._rows} has no conversation that can be used: {because}")
        share = count / (count + conversations)
        if share > most:
            raise UserError(
                f"{self._rows}: {count} rows ({100 * share:.1f}%) cannot be used, more than"
                f" --max-refused {most:g} allows: {reasons}"
            )


def _check_options(
    max_tokens: int | None, too_long: str, workers: int, max_refused: float, encoding: Encoding
) -> None:
    """Raises UserError: a value that no preparation can have."""
    if max_tokens is not None and max_tokens < 2:
        raise UserError(
            f"--max-tokens {max_tokens}: must be at least 2, one token to read and one to predict"
        )
    if too_long not in TOO_LONG:
        raise UserError(f"--too-long {too_long}: must be one of {', '.join(TOO_LONG)}")
    if workers < 1:
        raise UserError(f"--workers {workers}: must be at least 1")
    if not 0 <= max_refused <= 1:
        raise UserError(f"--max-refused {max_refused}: must be a share from 0 to 1")
    try:
        check_variables(encoding.variables)
    except Refusal as refusal:
        raise UserError(f"--chat-template-kwargs: {refusal.reason}") from refusal


def _outcomes(
    rows: Source, encoder: ChatEncoder, job: Job, workers: int
) -> Generator[tuple[list[Outcome], int]]:
    """(outcomes, how much of the input they end at) of every block, in the order of the input."""
    if workers == 1:
        for block in rows.blocks():
            yield encode_block(encoder, job, block), block.done
        return
    # A fork of this process, with its threads, may hang, and every
    # spawned one would import transformers anew, which takes seconds and
    # 400 MB: so workers are forks of a server that has only imported.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    pool = ProcessPoolExecutor(workers, context, _start_worker, (job,))
    waiting: deque[tuple[Future[list[Outcome]], int]] = deque()
    try:
        for block in rows.blocks():
            waiting.append((pool.submit(_work, block), block.done))
            if len(waiting) > 2 * workers:  # so that reading does not run ahead of tokenising
                future, done = waiting.popleft()
                yield future.result(), done
        while waiting:
            future, done = waiting.popleft()
            yield future.result(), done
    except BrokenProcessPool as error:
        raise UserError(
            "a worker process died, perhaps for lack of memory: pass fewer --workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


# of a worker process: what `encode_block` needs beside the block, sent once and not with each
_encode: Any = None


def _start_worker(job: Job) -> None:
    global _encode
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = (
        "false"  # texts come one by one: no pool of threads in every worker
    )
    _encode = partial(encode_block, job.encoding.encoder(load_tokenizer(job.tokenizer_dir)), job)


def _end_with_parent() -> None:
    """A pool's workers wait for ever when the parent is killed, because each holds the other end of
    its own pipe."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(block: Block) -> list[Outcome]:
    return _encode(block)


def _dated(encoding: Encoding) -> Encoding:
    """With today where no date is given, one for the whole job.

    Raises:
        UserError: the date is none.
    """
    if not encoding.date:
        return replace(encoding, date=datetime.date.today().isoformat())
    try:
        return replace(encoding, date=datetime.date.fromisoformat(encoding.date).isoformat())
    except ValueError as error:
        raise UserError(f"--date {encoding.date}: give a day as YYYY-MM-DD") from error


def _check_output(output: Path, inputs: list[Path], overwrite: bool) -> None:
    """Refuse an output that would replace an input or anything that is not a prepared folder."""
    new = output.resolve()
    for path in inputs:
        if new == path.resolve() or new in path.resolve().parents:
            raise UserError(f"--output {output} holds the input {path}: name another folder")
    if (
        overwrite
        and output.is_dir()
        and any(output.iterdir())
        and not (output / CARD_FILE).is_file()
    ):
        raise UserError(
            f"{output} exists and has no {CARD_FILE}, so it is not overwritten: name another folder"
        )
