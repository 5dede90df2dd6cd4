"""One row of the input -> its tokens, which of them are supervised, and their weights.

`messages`: the chat template of the tokenizer writes the text, which is tokenised once and as a
    whole (the template writes BOS itself). Supervised are the tokens that overlap an assistant
    turn, its end token included: the last special token of the turn (<|im_end|>, <|eot_id|>, </s>),
    but not white space behind it. A template that ends a turn without special token is refused: the
    model would never learn to stop. `tools` of the row go to the template.
`prompt`, `completion` as strings: raw text, without template. The tokens are those of the prompt
    with the BOS that the tokenizer adds, those of the completion, and EOS unless the completion
    ends with it; completion and EOS are supervised.
`prompt`, `completion` as lists of messages: one conversation, of which only the completion's
    assistant turns are supervised. `messages` wins where a row has both.

A row's `weight` is a number >= 0. `critical` is a list of [start, end) in characters; it stands in
the row for a string completion, and in an assistant message for that message. Both make
token_weights = weight * critical: once a row names critical spans, tokens that overlap one have 1
and all others of the row 0.
"""

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_tsft.data.rows import Spans, read_critical, read_messages, read_weight
from megatron_tsft.data.turns import ChatTemplate, Message, Refusal, Turn, content_place
from megatron_tsft.errors import UserError


@dataclass(frozen=True)
class Encoded:
    """One conversation of n tokens."""

    input_ids: np.ndarray  # [n] int32
    loss_mask: np.ndarray  # [n] bool; never True at 0, which nothing predicts
    # [n] float32, 0 outside the mask; None without `weight` and `critical`
    token_weights: np.ndarray | None

    def cut(self, length: int | None) -> "Encoded":
        """The first `length` tokens."""
        weights = None if self.token_weights is None else self.token_weights[:length]
        return Encoded(self.input_ids[:length], self.loss_mask[:length], weights)


@dataclass(frozen=True)
class _Tokens:
    """A tokenised text; token i covers the characters [starts[i], ends[i])."""

    ids: np.ndarray  # [n] int32
    starts: np.ndarray  # [n] int64
    ends: np.ndarray  # [n] int64
    special: np.ndarray  # [n] bool

    def overlap(self, start: int, stop: int) -> np.ndarray:
        """[n] bool: tokens that share a character with [start, stop)."""
        return (self.starts < stop) & (self.ends > start)


class ChatEncoder:
    """Rows -> tokens, with one tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        """Raises UserError where the tokenizer cannot say which characters a token covers."""
        if not tokenizer.is_fast:
            raise UserError(
                f"{tokenizer.name_or_path} is a slow tokenizer ({type(tokenizer).__name__}), which"
                " cannot say which characters a token covers: save it as a fast one"
                " (tokenizer.json)"
            )
        self._template: ChatTemplate | None = None
        self._tokenizer = tokenizer
        # Byte-level post-processors cut spaces off the offsets, so that a token of spaces would
        # cover nothing; without special tokens a post-processor does nothing else.
        self._plain = copy.deepcopy(tokenizer)
        self._plain.backend_tokenizer.post_processor = None
        marked = [i for i, token in tokenizer.added_tokens_decoder.items() if token.special]
        self._special = np.array(sorted({*marked, *tokenizer.all_special_ids}), np.int32)
        bare, dressed = (
            tokenizer("a", add_special_tokens=flag)["input_ids"] for flag in (False, True)
        )
        before = next(i for i in range(len(dressed)) if dressed[i : i + len(bare)] == bare)
        self._before = np.array(dressed[:before], np.int32)  # BOS where the tokenizer adds one

    def encode(self, row: dict[str, Any]) -> Encoded:
        """Tokens, mask and weights of one row.

        Raises:
            Refusal: this row cannot be used.
            UserError: no row can: the tokenizer lacks what the format needs.
        """
        # Arrow writes null for a missing key
        row = {key: value for key, value in row.items() if value is not None}
        weight = read_weight(row)
        if "messages" in row:
            encoded = self._chat(read_messages(row["messages"]), 0, row, weight)
        elif "prompt" not in row or "completion" not in row:
            raise Refusal("neither `messages` nor `prompt` and `completion`")
        elif isinstance(row["prompt"], str) and isinstance(row["completion"], str):
            encoded = self._text(
                row["prompt"], row["completion"], read_critical(row, row["completion"]), weight
            )
        elif isinstance(row["prompt"], list) and isinstance(row["completion"], list):
            prompt, completion = read_messages(row["prompt"]), read_messages(row["completion"])
            encoded = self._chat(prompt + completion, len(prompt), row, weight)
        else:
            raise Refusal(
                "`prompt` and `completion` are neither two strings nor two lists of messages"
            )
        if not encoded.loss_mask.any():
            raise Refusal("no supervised token")
        return encoded

    def _tokens(self, text: str) -> _Tokens:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise Refusal(
                "the text has half of a surrogate pair, which no tokenizer takes"
            ) from None
        out = self._plain(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        ids = np.array(out["input_ids"], np.int32)
        offsets = np.array(out["offset_mapping"], np.int64).reshape(-1, 2)
        return _Tokens(ids, offsets[:, 0], offsets[:, 1], np.isin(ids, self._special))

    def _text(
        self, prompt: str, completion: str, critical: Spans | None, weight: float | None
    ) -> Encoded:
        eos = self._tokenizer.eos_token_id
        if eos is None:
            raise UserError(
                f"the tokenizer {self._tokenizer.name_or_path} has no EOS token, which ends a"
                " completion: set its eos_token"
            )
        before, tokens = (
            np.concatenate([self._before, self._tokens(prompt).ids]),
            self._tokens(completion),
        )
        if not completion.strip() or not len(tokens.ids):
            raise Refusal("the completion is empty")
        end = [eos] if tokens.ids[-1] != eos else []
        ids = np.concatenate([before, tokens.ids, np.array(end, np.int32)])
        mask = np.arange(len(ids)) >= len(before)
        chosen = None
        if critical is not None:
            chosen = np.zeros(len(ids), bool)
            for start, stop in critical:
                chosen[len(before) : len(before) + len(tokens.ids)] |= tokens.overlap(start, stop)
        return _encoded(ids, mask, weight, chosen)

    def _chat(
        self, messages: list[Message], first: int, row: dict[str, Any], weight: float | None
    ) -> Encoded:
        """A conversation whose assistant turns from message `first` on are supervised."""
        if "critical" in row:
            raise Refusal(
                "`critical` stands in the row: write it into the assistant message whose offsets"
                " it has"
            )
        tools = row.get("tools") or None
        if tools is not None and not (
            isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)
        ):
            raise Refusal("`tools` is not a list of JSON schemas")
        if not any(message["role"] == "assistant" for message in messages[first:]):
            raise Refusal("no assistant turn")
        if self._template is None:
            self._template = ChatTemplate(self._tokenizer)
        critical = {
            i: read_critical(message, message["content"]) for i, message in enumerate(messages)
        }
        bare = [
            {key: value for key, value in message.items() if key != "critical"}
            for message in messages
        ]
        text, turns = self._template.turns(bare, tools)
        tokens = self._tokens(text)
        mask, chosen = np.zeros(len(tokens.ids), bool), np.zeros(len(tokens.ids), bool)
        for number, turn in enumerate(turns):
            if turn.message is None and (first or any(critical.values())):
                raise Refusal(
                    "the template's {% generation %} blocks cannot be matched with the assistant"
                    " messages"
                )
            end = _end_token(text, tokens, turn)
            if end is None and (turn.message is not None or number == len(turns) - 1):
                raise Refusal(
                    "the chat template ends an assistant turn without special token, so the model"
                    " would never learn to stop: write the EOS token behind the content in the"
                    " template"
                )
            body, stop = (
                (turn.stop, turn.stop)
                if end is None
                else (int(tokens.starts[end]), int(tokens.ends[end]))
            )
            if turn.message is not None and turn.message < first:
                continue
            # a special token that began before the turn and
            # swallows white space belongs to the template's header
            mask |= tokens.overlap(turn.start, stop) & ~(
                tokens.special & (tokens.starts < turn.start)
            )
            if turn.message is not None and critical[turn.message]:
                place = content_place(text, turn.start, body, bare[turn.message]["content"])
                if place is None:
                    raise Refusal(
                        "the chat template changes an assistant message, so `critical` has no"
                        " place in it"
                    )
                for begin, last in critical[turn.message] or []:
                    chosen |= tokens.overlap(
                        max(place.start + begin, turn.start), min(place.start + last, body)
                    )
        named = any(spans is not None for spans in critical.values())
        return _encoded(tokens.ids, mask, weight, chosen if named else None)


def mark_supervised(tokenizer: Any, input_ids: np.ndarray, loss_mask: np.ndarray) -> str:
    """The decoded text of a conversation [n] with its supervised parts in [[...]]."""
    borders = np.flatnonzero(np.diff(loss_mask.astype(np.int8), prepend=0, append=0)).tolist()
    pieces = []
    for start, stop in zip([0, *borders], [*borders, len(input_ids)], strict=True):
        text = tokenizer.decode(input_ids[start:stop].tolist(), clean_up_tokenization_spaces=False)
        pieces.append(f"[[{text}]]" if start < stop and loss_mask[start] else text)
    return "".join(pieces)


def _encoded(
    ids: np.ndarray, mask: np.ndarray, weight: float | None, chosen: np.ndarray | None
) -> Encoded:
    mask = mask.copy()
    mask[:1] = False
    weights = None
    if weight is not None or chosen is not None:
        weights = (mask if chosen is None else mask & chosen) * np.float32(
            1.0 if weight is None else weight
        )
    return Encoded(ids.astype(np.int32), mask, weights)


def _end_token(text: str, tokens: _Tokens, turn: Turn) -> int | None:
    """Which special token ends a turn: nothing but white space lies between it and the stop."""
    special = np.flatnonzero(tokens.special & (tokens.starts >= turn.start))
    inside = special[tokens.starts[special] < turn.stop]
    if len(inside) and not text[tokens.ends[inside[-1]] : turn.stop].strip():
        return int(inside[-1])
    behind = special[len(inside) :]
    if turn.open and len(behind) and not text[turn.stop : tokens.starts[behind[0]]].strip():
        return int(behind[0])
    return None
