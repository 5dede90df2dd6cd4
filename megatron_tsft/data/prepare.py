"""The preparation job: rows of the input -> tokens -> a prepared folder, or two where a share is
held out."""

import contextlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_tsft.atomic import new_directory
from megatron_tsft.checkpoint.tokenizer import load_tokenizer, tokenizer_fingerprint
from megatron_tsft.data import formats
from megatron_tsft.data.chat import ChatEncoder, Encoded
from megatron_tsft.data.encoding import TOO_LONG, Encoding, Job, Outcome
from megatron_tsft.data.heldout import HeldOut
from megatron_tsft.data.prepared import CARD_FILE, DataCard
from megatron_tsft.data.rows import check_variables
from megatron_tsft.data.source import Source, open_source
from megatron_tsft.data.turns import Refusal
from megatron_tsft.data.workers import outcomes_of
from megatron_tsft.data.writer import PreparedWriter
from megatron_tsft.errors import UserError
from megatron_tsft.trust import trusted

LINES_KEPT = 5  # first line numbers of each reason
MAX_REFUSED = 0.1


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
    heldout: float = 0.0,
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
        heldout: the share of conversations that go to `heldout_folder(output)` instead.
        encoding: see Encoding; without a date it is today.

    Raises:
        UserError: bad arguments, an input that cannot be read, no conversation that can be used, or
            with `strict` one that cannot.
    """
    output, encoding = Path(output), (encoding or Encoding()).dated()
    _check_options(max_tokens, too_long, workers, max_refused, heldout, encoding)
    rows = open_source(source)
    folders = [output, heldout_folder(output)] if heldout else [output]
    for folder in folders:
        _check_output(folder, [*(part.path for part in rows.parts), Path(tokenizer_dir)], overwrite)
    if not encoding.format:
        found = formats.detect(rows.first_rows(), encoding.columns, str(rows))
        encoding = replace(encoding, format=found)
    tokenizer = load_tokenizer(tokenizer_dir)
    job = Job(str(tokenizer_dir), max_tokens, too_long, encoding, trusted())
    results = outcomes_of(rows, ChatEncoder(tokenizer, encoding), job, workers)
    refused = _Refused(rows, strict=strict)
    facts = {
        "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer),
        "date": encoding.date,
        "made_with": encoding.made_with() | ({"heldout": heldout} if heldout else {}),
    }
    with contextlib.ExitStack() as stack:
        enter = stack.enter_context
        writers = [
            enter(contextlib.closing(PreparedWriter(enter(new_directory(f, overwrite=overwrite)))))
            for f in folders
        ]
        enter(contextlib.closing(results))
        used = _used(_with_bar(results, rows.total, show=progress), refused)
        if heldout:
            spool = enter(contextlib.closing(HeldOut(writers[0].spare_file, heldout)))
            for group, encoded in used:
                spool.add(group, encoded)
            refused.check(spool.conversations, max_refused)
            for held, encoded in spool.divided():
                writers[held].add(encoded)
        else:
            for _, encoded in used:
                writers[0].add(encoded)
            refused.check(writers[0].conversations, max_refused)
        cards: list[DataCard] = []
        for writer in writers:
            own = {
                "turn_ends": {
                    tokenizer.convert_ids_to_tokens(end): (end, count)
                    for end, count in sorted(writer.ends.items())
                },
                "chat_template": encoding.template(tokenizer) if writer.templated else None,
            }
            if not cards:  # what was left out is left out of the first
                own |= {"refused": dict(refused.counts), "refused_lines": dict(refused.places)}
            cards.append(writer.finish(**facts, **own))
    return cards[0]


def heldout_folder(output: Path | str) -> Path:
    """Where held-out conversations go: beside the others."""
    output = Path(output)
    return output.with_name(f"{output.name}-heldout")


def _with_bar(
    results: Iterator[tuple[list[Outcome], int]], total: int, *, show: bool
) -> Iterator[Outcome]:
    """The outcomes, one by one, with a progress bar over the `total` bytes of the input."""
    from tqdm import tqdm

    options: dict[str, Any] = {"unit": "B", "unit_scale": True, "disable": not show}
    with tqdm(total=total, desc="tokenising", **options) as bar:
        for outcomes, done in results:
            yield from outcomes
            bar.update(done - bar.n)


class _Refused:
    """The rows that cannot be used: how many for each reason, and where the first of them are."""

    def __init__(self, rows: Source, *, strict: bool) -> None:
        self._rows, self._strict = rows, strict
        self.counts = Counter[str]()
        self.places = defaultdict[str, list[int | str]](list)

    def add(self, outcome: Outcome) -> None:
        """Raises UserError where strict."""
        if self._strict:
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


def _used(outcomes: Iterator[Outcome], refused: _Refused) -> Iterator[tuple[int, Encoded]]:
    """(group, conversation) of the rows that can be used."""
    for outcome in outcomes:
        if outcome.encoded is None:
            refused.add(outcome)
        else:
            yield outcome.group, outcome.encoded


def _check_options(
    max_tokens: int | None,
    too_long: str,
    workers: int,
    max_refused: float,
    heldout: float,
    encoding: Encoding,
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
    if not 0 <= heldout < 1:
        raise UserError(f"--heldout {heldout}: must be a share of the conversations, as 0.02")
    try:
        check_variables(encoding.variables)
    except Refusal as refusal:
        raise UserError(f"--chat-template-kwargs: {refusal.reason}") from refusal


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
