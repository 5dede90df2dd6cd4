"""One row of the input -> its tokens, which of them are supervised, and their weights.

A conversation is written by the chat template (turns.py) and tokenised once and as a whole: the
template writes BOS itself. Supervised are the tokens that overlap an assistant turn, its end token
included: the last special token of the turn (<|im_end|>, <|eot_id|>, </s>), but not white space
behind it. Where a turn ends by the next role's token (GLM), that token is the end, as served; where
the text ends before it, EOS is appended. A template that ends a turn in neither way is refused: the
model would never learn to stop.

Raw text has no template. Its tokens are those of the prompt with the BOS that the tokenizer adds,
those of the completion, and EOS unless the completion ends with it.
"""

import copy
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from megatron_tsft.data.rows import Text, read_row
from megatron_tsft.data.tokens import Tokens, end_token
from megatron_tsft.data.turns import Refusal, content_place
from megatron_tsft.data.written import ChatOptions, ConversationWriter, Written, check_text
from megatron_tsft.errors import UserError


@dataclass(frozen=True)
class Encoded:
    """One conversation of n tokens."""

    input_ids: np.ndarray  # [n] int32
    loss_mask: np.ndarray  # [n] bool; never True at 0, which nothing predicts
    # [n] float32, 0 outside the mask; None without weights and `critical`
    token_weights: np.ndarray | None
    end: int | None = None  # the token that ends the last supervised turn
    templated: bool = False  # a chat template wrote it
    truncated: bool = False

    def cut(self, length: int) -> "Encoded":
        """The first `length` tokens of more."""
        weights = None if self.token_weights is None else self.token_weights[:length]
        ids, mask = self.input_ids[:length], self.loss_mask[:length]
        return Encoded(ids, mask, weights, None, self.templated, truncated=True)


@dataclass(frozen=True)
class Planned:
    """Rows as texts: `plans` has each row's parts or its refusal, `texts` those of all parts."""

    plans: list[list[Written | Text] | Refusal]
    texts: list[str]


class ChatEncoder:
    """Rows -> tokens, with one tokenizer."""

    def __init__(self, tokenizer: Any, options: ChatOptions | None = None) -> None:
        """Raises UserError where the tokenizer cannot say which characters a token covers."""
        if not tokenizer.is_fast:
            raise UserError(
                f"{tokenizer.name_or_path} is a slow tokenizer ({type(tokenizer).__name__}), which"
                " cannot say which characters a token covers: save it as a fast one"
                " (tokenizer.json)"
            )
        self._tokenizer = tokenizer
        # Byte-level post-processors cut spaces off the offsets, so that a token of spaces would
        # cover nothing; without special tokens a post-processor does nothing else.
        plain = copy.deepcopy(tokenizer)
        plain.backend_tokenizer.post_processor = None
        plain.backend_tokenizer.no_truncation()
        plain.backend_tokenizer.no_padding()
        self._plain = plain.backend_tokenizer
        marked = [i for i, token in tokenizer.added_tokens_decoder.items() if token.special]
        special = sorted({*marked, *tokenizer.all_special_ids})
        self._special = np.zeros(max(len(tokenizer), *special, 0) + 1, bool)
        self._special[special] = True
        bare, dressed = (
            tokenizer("a", add_special_tokens=flag)["input_ids"] for flag in (False, True)
        )
        before = next(i for i in range(len(dressed)) if dressed[i : i + len(bare)] == bare)
        self._before = np.array(dressed[:before], np.int32)  # BOS where the tokenizer adds one
        self._writer = ConversationWriter(
            tokenizer, self._plain, self._special, options or ChatOptions()
        )

    def encode(self, row: dict[str, Any]) -> Encoded:
        """Tokens, mask and weights of one row that is one conversation.

        Raises:
            Refusal: this row cannot be used.
            UserError: no row can: the tokenizer lacks what the format needs.
        """
        [encoded] = self.encode_rows([row])
        if isinstance(encoded, Refusal):
            raise encoded
        [only] = encoded
        return only

    def encode_rows(
        self, rows: Iterable[dict[str, Any] | Refusal]
    ) -> list[list[Encoded] | Refusal]:
        """What becomes of each row: conversations (more than one with one-row-per-turn), or why it
        cannot be used. The texts of all rows are tokenised together.

        Raises:
            UserError: no row can be used: the tokenizer lacks what the format needs.
        """
        planned = self.plan(rows)
        return self.finish(planned, self.tokenise(planned))

    def plan(self, rows: Iterable[dict[str, Any] | Refusal]) -> "Planned":
        """The texts of some rows, not yet tokenised."""
        plans: list[list[Written | Text] | Refusal] = []
        texts: list[str] = []
        for row in rows:
            try:
                if isinstance(row, Refusal):
                    raise row
                read = read_row(row)
                parts: list[Written | Text] = (
                    [read] if isinstance(read, Text) else [*self._writer.texts(read)]
                )
                for part in parts:
                    check_text(_text_of(part))
                plans.append(parts)
                texts += [_text_of(part) for part in parts]
            except Refusal as refusal:
                plans.append(refusal)
        return Planned(plans, texts)

    def tokenise(self, planned: "Planned") -> list[Any]:
        """The encodings of all texts, in the tokenizer's own threads; another thread may plan
        meanwhile."""
        return self._plain.encode_batch(planned.texts, add_special_tokens=False)

    def finish(self, planned: "Planned", found: list[Any]) -> list[list[Encoded] | Refusal]:
        """What becomes of the planned rows, given their encodings."""
        encodings, plans = iter(found), planned.plans
        out: list[list[Encoded] | Refusal] = []
        for plan in plans:
            if isinstance(plan, Refusal):
                out.append(plan)
                continue
            parts = [(part, next(encodings)) for part in plan]
            try:
                out.append(
                    [
                        self._text(part, encoding)
                        if isinstance(part, Text)
                        else self._chat(part, encoding)
                        for part, encoding in parts
                    ]
                )
            except Refusal as refusal:
                out.append(refusal)
        return out

    def _chat(self, written: Written, encoding: Any) -> Encoded:
        """Tokens of a conversation."""
        text = written.text
        tokens = Tokens(encoding, self._special)
        ends = [end_token(text, tokens, turn) for turn in written.turns]
        appended = ends[-1] is None and written.appends()
        if appended:
            eos = self._tokenizer.eos_token_id
            if eos is None:
                raise Refusal(
                    "a turn ends without special token, and the tokenizer has no EOS token"
                )
            tokens.append(eos)
        mask = np.zeros(len(tokens.ids), bool)
        chosen = np.zeros(len(tokens.ids), bool)
        weights = np.zeros(len(tokens.ids), np.float32)
        for number, (turn, end) in enumerate(zip(written.turns, ends, strict=True)):
            last = number == len(written.turns) - 1
            more = any(  # blocks of this message
                later.message == turn.message for later in written.turns[number + 1 :]
            )
            if end is None and not more and not (last and appended):
                raise Refusal(
                    "the chat template ends an assistant turn without special token, so the"
                    " model would never learn to stop: write the EOS token behind the content"
                    " in the template"
                )
            body, stop = (turn.stop, turn.stop) if end is None else tokens.span(end)
            part = tokens.overlap(turn.start, stop)
            where = np.zeros(len(mask), bool)
            where[part] = True
            # a special token that began before the turn and
            # swallows white space belongs to the template's header
            if part.start < part.stop and part.start in tokens.special_places:
                where[part.start] = tokens.span(part.start)[0] >= turn.start
            if last and appended:
                where[-1] = True
            mask |= where
            weights[where] = written.weights[number]
            named = written.critical[number]
            if named is not None and named[1] and not more:
                place = content_place(text, turn.start, body, named[0])
                if place is None:
                    raise Refusal(
                        "the chat template changes an assistant message, so `critical` has no"
                        " place in it"
                    )
                for begin, until in named[1]:
                    chosen[
                        tokens.overlap(
                            max(place.start + begin, turn.start), min(place.start + until, body)
                        )
                    ] = True
        if written.everything:
            mask[:] = True
            weights[:] = 1
        weighted = written.weight is not None
        if any(named is not None for named in written.critical):
            weights *= chosen
            weighted = True
        scale = 1.0 if written.weight is None else written.weight
        found = _encoded(tokens.ids, mask, weights * np.float32(scale) if weighted else None)
        last_end = -1 if appended else ends[-1]
        end = None if last_end is None else int(tokens.ids[last_end])
        return replace(found, end=end, templated=True)

    # ---- raw text

    def _text(self, text: Text, encoding: Any) -> Encoded:
        eos = self._tokenizer.eos_token_id
        if eos is None:
            raise UserError(
                f"the tokenizer {self._tokenizer.name_or_path} has no EOS token, which ends a"
                " completion: set its eos_token"
            )
        border = len(text.prompt or "")
        tokens = Tokens(encoding, self._special)
        ids = tokens.ids
        if not len(ids):
            raise Refusal("the completion is empty")
        # a prompt that a template has written begins with BOS already
        before = self._before
        if len(before) and len(ids) >= len(before) and (ids[: len(before)] == before).all():
            before = before[:0]
        end = [eos] if ids[-1] != eos else []
        part = tokens.overlap(border, border + len(text.completion))
        start = len(before) + part.start if text.prompt is not None else 0
        ids = np.concatenate([before, ids, np.array(end, np.int32)])
        mask = np.arange(len(ids)) >= start
        weights = None
        if text.weight is not None or text.critical is not None:
            weights = mask.astype(np.float32)
            if text.critical is not None:
                chosen = np.zeros(len(ids), bool)
                for begin, stop in text.critical:
                    found = tokens.overlap(border + begin, border + stop)
                    chosen[len(before) + found.start : len(before) + found.stop] = True
                weights *= chosen
            weights *= np.float32(1.0 if text.weight is None else text.weight)
        return replace(_encoded(ids, mask, weights), end=eos)


def _text_of(part: Written | Text) -> str:
    """What of a part is tokenised: one text, so that nothing is gained at a border."""
    return part.text if isinstance(part, Written) else (part.prompt or "") + part.completion


def _encoded(ids: np.ndarray, mask: np.ndarray, weights: np.ndarray | None) -> Encoded:
    mask = mask.copy()
    mask[:1] = False
    if not mask.any():
        raise Refusal("no supervised token")
    if weights is not None:
        weights = np.where(mask, weights, np.float32(0))
    return Encoded(ids.astype(np.int32), mask, weights)
