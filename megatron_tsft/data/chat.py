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
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from megatron_tsft.data.dropped import OPEN, dropped_thoughts, protect, restore
from megatron_tsft.data.marked_template import Message, Rendered, Span
from megatron_tsft.data.rows import Conversation, Spans, Text, read_row
from megatron_tsft.data.turns import REFUSES, ChatTemplate, Refusal, Turn, content_place
from megatron_tsft.errors import UserError

HISTORY_THINKING = ("template", "one-row-per-turn", "refuse")
SUPERVISE = ("all", "last", "everything")


@dataclass(frozen=True)
class ChatOptions:
    """How every row is encoded.

    Attributes:
        chat_template: Jinja text in place of the tokenizer's own.
        variables: of the template, for every row; a row's own win.
        now: what the template's strftime_now gives, for all rows alike.
        history_thinking: what happens to a conversation whose template drops the thoughts of
            earlier turns: it stays as the template writes it, becomes a row for each turn, or is
            refused.
        supervise: all assistant turns, the last one, or every token.
    """

    chat_template: str | None = None
    variables: dict[str, Any] | None = None
    now: Callable[[str], str] | None = None
    history_thinking: str = "template"
    supervise: str = "all"


@dataclass(frozen=True)
class Encoded:
    """One conversation of n tokens."""

    input_ids: np.ndarray  # [n] int32
    loss_mask: np.ndarray  # [n] bool; never True at 0, which nothing predicts
    # [n] float32, 0 outside the mask; None without weights and `critical`
    token_weights: np.ndarray | None

    def cut(self, length: int | None) -> "Encoded":
        """The first `length` tokens."""
        weights = None if self.token_weights is None else self.token_weights[:length]
        return Encoded(self.input_ids[:length], self.loss_mask[:length], weights)


class _Tokens:
    """A tokenised text; characters are asked for one at a time, because a list of all offsets takes
    longer than the tokenising."""

    def __init__(self, encoding: Any, special: np.ndarray, ends_with: int | None = None) -> None:
        """special: ids, sorted. ends_with: a token behind the text."""
        self.ids = np.array(encoding.ids, np.int32)  # [n]
        self._encoding = encoding
        self._length = len(self.ids)
        self.special = np.isin(self.ids, special)  # [n] bool
        if ends_with is not None:
            self.ids = np.append(self.ids, np.int32(ends_with))
            self.special = np.append(self.special, False)

    def span(self, token: int) -> tuple[int, int]:
        """The characters [start, end) of a token."""
        return self._encoding.token_to_chars(token)

    def overlap(self, start: int, stop: int) -> slice:
        """The tokens that share a character with [start, stop)."""
        for at in range(start, stop):  # a tokenizer may drop characters
            first = self._encoding.char_to_token(at)
            if first is not None:
                break
        else:
            return slice(0, 0)
        last = first
        while last < self._length and self.span(last)[0] < stop:
            last = self._after(last, stop)
        return slice(first, last)

    def _after(self, token: int, stop: int) -> int:
        """A later token that is not behind the first one that begins at or after `stop`."""
        if token + 1 >= self._length or self.span(token + 1)[0] >= stop:
            return token + 1
        near = self._encoding.char_to_token(stop - 1)
        return max(token + 1, near if near is not None else 0)


@dataclass(frozen=True)
class Written:
    """A conversation as text, before it is tokenised.

    Attributes:
        text: what is tokenised, as a whole.
        turns: the supervised ones, in order.
        weights: of each turn.
        critical: (content, spans) of each turn, None without.
        appended: the text ends before the token that ends its last turn.
    """

    text: str
    turns: list[Turn]
    weights: list[float]
    critical: list[tuple[str, Spans] | None]
    weight: float | None
    appended: bool
    everything: bool


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
        self._options = options or ChatOptions()
        self._templates: dict[str, ChatTemplate] = {}
        self._ends: dict[str, bool] = {}
        self._tokenizer = tokenizer
        # Byte-level post-processors cut spaces off the offsets, so that a token of spaces would
        # cover nothing; without special tokens a post-processor does nothing else.
        plain = copy.deepcopy(tokenizer)
        plain.backend_tokenizer.post_processor = None
        plain.backend_tokenizer.no_truncation()
        plain.backend_tokenizer.no_padding()
        self._plain = plain.backend_tokenizer
        marked = [i for i, token in tokenizer.added_tokens_decoder.items() if token.special]
        self._special = np.array(sorted({*marked, *tokenizer.all_special_ids}), np.int32)
        bare, dressed = (
            tokenizer("a", add_special_tokens=flag)["input_ids"] for flag in (False, True)
        )
        before = next(i for i in range(len(dressed)) if dressed[i : i + len(bare)] == bare)
        self._before = np.array(dressed[:before], np.int32)  # BOS where the tokenizer adds one

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

    def encode_rows(self, rows: Iterable[dict[str, Any] | Refusal]) -> list[list[Encoded] | Refusal]:
        """What becomes of each row: conversations (more than one with one-row-per-turn), or why it
        cannot be used. The texts of all rows are tokenised together.

        Raises:
            UserError: no row can be used: the tokenizer lacks what the format needs.
        """
        plans: list[list[Written | Text] | Refusal] = []
        texts: list[str] = []
        for row in rows:
            try:
                if isinstance(row, Refusal):
                    raise row
                read = read_row(row)
                plan: list[Written | Text] = (
                    [read] if isinstance(read, Text) else [*self._written(read)]
                )
                for part in plan:
                    _check_text(_text_of(part))
                plans.append(plan)
                texts += [_text_of(part) for part in plan]
            except Refusal as refusal:
                plans.append(refusal)
        encodings = iter(self._plain.encode_batch(texts, add_special_tokens=False))
        out: list[list[Encoded] | Refusal] = []
        for plan in plans:
            if isinstance(plan, Refusal):
                out.append(plan)
                continue
            found = [(part, next(encodings)) for part in plan]
            try:
                out.append(
                    [
                        self._text(part, encoding)
                        if isinstance(part, Text)
                        else self._chat(part, encoding)
                        for part, encoding in found
                    ]
                )
            except Refusal as refusal:
                out.append(refusal)
        return out

    # ---- conversations

    def _template(self, conversation: Conversation) -> ChatTemplate:
        """The template of a conversation: a tokenizer may have another one for tools."""
        tokenizer = self._tokenizer
        if self._options.chat_template is not None:
            source = self._options.chat_template
        elif tokenizer.chat_template:
            source = tokenizer.get_chat_template(None, conversation.tools)
        else:
            raise UserError(
                f"the tokenizer {tokenizer.name_or_path} has no chat template, which `messages`"
                " need: add its chat_template.jinja, name one (--chat-template FILE), or write rows"
                " of `prompt` and `completion`"
            )
        if source not in self._templates:
            self._templates[source] = ChatTemplate(
                source,
                tokenizer.name_or_path,
                lambda text: [end for _, end in self._plain.encode(text, add_special_tokens=False).offsets],
                dict(tokenizer.special_tokens_map),
                self._options.now,
            )
        return self._templates[source]

    def _written(self, conversation: Conversation) -> list[Written]:
        """The texts of a conversation: one, or with one-row-per-turn several."""
        if self._options.supervise == "last" and not conversation.first:
            last = conversation.learnt[-1]
            factors = [f if i >= last else 0.0 for i, f in enumerate(conversation.factors)]
            conversation = replace(conversation, factors=factors)
        variables = (self._options.variables or {}) | conversation.variables
        conversation = replace(conversation, variables=variables)
        refusals: list[Refusal] = []
        for candidate in _writings(conversation):
            try:
                return self._write(candidate)
            except Refusal as refusal:
                refusals.append(refusal)
        # why the template could not be used says more than why one way of writing failed
        raise next((r for r in refusals if not r.reason.startswith(REFUSES)), refusals[0])

    def _write(self, conversation: Conversation) -> list[Written]:
        template = self._template(conversation)
        messages, given = conversation.messages, _given(conversation)
        rendered = template.locate(messages, **given)

        def render(changed: list[Message], tools: list[Any] | None) -> Rendered:
            return template.locate(changed, **{**given, "tools": tools})

        try:
            lost = dropped_thoughts(conversation, rendered, render)
        except Refusal:
            if conversation.first:
                return [self._behind_prompt(template, conversation, rendered)]
            raise
        last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
        if any(thought.message != last for thought in lost):
            if self._options.history_thinking == "refuse":
                raise Refusal(
                    "the chat template drops the thought of an earlier turn (--history-thinking"
                    " refuse)"
                )
            rounds = _rounds(conversation)
            if self._options.history_thinking == "one-row-per-turn" and len(rounds) > 1:
                return [written for part in rounds for written in self._write(part)]
        for thought in lost:
            if thought.message != last or last not in conversation.learnt:
                continue
            if thought.key != "content":
                raise Refusal(
                    f"the chat template drops `{thought.key}` of the last turn: write the thought"
                    " into the content as <think>...</think>, or give a template that writes it"
                    " (--chat-template)"
                )
            rendered = self._with_thought(template, conversation, last)
        return [self._finished(template, conversation, rendered, rendered.text)]

    def _with_thought(
        self, template: ChatTemplate, conversation: Conversation, last: int
    ) -> Rendered:
        """The conversation with the thought of the last turn, which the template would cut off:
        the model generates it behind the generation prompt."""
        messages, given = conversation.messages, _given(conversation)
        content = messages[last]["content"]
        if OPEN not in content:  # the generation prompt has opened it
            content = f"{OPEN}\n{content}"
        message = messages[last] | {"content": protect(content)}
        rendered = template.locate([*messages[:last], message, *messages[last + 1 :]], **given)
        rendered = replace(rendered, text=restore(rendered.text))
        prompted = template.prompted(messages[:last], **given)
        if not rendered.text.startswith(prompted) or prompted.rstrip().endswith("</think>"):
            raise Refusal(
                "the chat template drops the thought of the last turn, and its generation prompt"
                " has no place for one: set chat_template_kwargs for thinking, or give another"
                " template (--chat-template)"
            )
        return rendered

    def _behind_prompt(
        self, template: ChatTemplate, conversation: Conversation, rendered: Rendered
    ) -> Written:
        """A completion behind its prompt as served, which says more than the finished conversation
        (Mistral writes the system message before the last question alone)."""
        given, first = _given(conversation), conversation.first
        prompt = conversation.messages[:first]
        asked = replace(
            conversation, messages=prompt, factors=conversation.factors[:first],
            critical=conversation.critical[:first],
        )

        def render(changed: list[Message], tools: list[Any] | None) -> Rendered:
            variables = {**given, "tools": tools, "add_generation_prompt": True}
            return template.locate(changed, **variables)

        served = render(prompt, conversation.tools)
        dropped_thoughts(asked, served, render)
        written = self._finished(template, conversation, rendered, rendered.text)
        begin = written.turns[0].start
        shift = len(served.text) - begin
        turns = [
            replace(t, start=t.start + shift, stop=t.stop + shift, written=t.start + shift)
            for t in written.turns
        ]
        return replace(written, text=served.text + rendered.text[begin:], turns=turns)

    def _finished(
        self, template: ChatTemplate, conversation: Conversation, rendered: Rendered, text: str
    ) -> Written:
        messages, given = conversation.messages, _given(conversation)
        _check_text(text)
        turns = template.turns(rendered, messages, conversation.learnt, **given)
        if not turns:
            raise Refusal("no assistant turn is within the template's {% generation %} blocks")
        named = any(spans is not None for spans in conversation.critical)
        if any(turn.message is None for turn in turns) and (conversation.first or named):
            raise Refusal(
                "the template has a {% generation %} block outside its loop over the messages,"
                " which cannot be matched with an assistant message"
            )
        critical: list[tuple[str, Spans] | None] = []
        weights: list[float] = []
        for turn in turns:
            place = turn.message
            weights.append(1.0 if place is None else conversation.factors[place])
            spans = None if place is None else conversation.critical[place]
            content = "" if place is None else str(messages[place]["content"])
            critical.append((content, spans or []) if named else None)
        weighted = any(factor != 1 for factor in weights)
        weight = conversation.weight
        return Written(
            text,
            turns,
            weights,
            critical,
            1.0 if weight is None and weighted else weight,
            self._needs_end(template, conversation, rendered, text, turns[-1]),
            self._options.supervise == "everything",
        )

    def _needs_end(
        self,
        template: ChatTemplate,
        conversation: Conversation,
        rendered: Rendered,
        text: str,
        turn: Turn,
    ) -> bool:
        """Whether the last turn's end token is the one that the next role would begin with, and the
        text ends before it."""
        if text[turn.stop :].strip() or turn.message is None:
            return False
        ids = self._plain.encode(text[turn.start : turn.stop].rstrip(), add_special_tokens=False).ids
        if ids and np.isin(ids[-1], self._special):
            return False
        key = template.source
        if key not in self._ends:
            behind = template.ends_by_next_role(
                rendered, conversation.messages, **_given(conversation)
            )
            own = text[turn.written : turn.stop]
            following, first = (
                self._plain.encode(part.lstrip(), add_special_tokens=False).ids
                for part in (behind, own)
            )
            self._ends[key] = bool(
                following
                and np.isin(following[0], self._special)
                and following[0] != first[0]
            )
        return self._ends[key]

    def _chat(self, written: Written, encoding: Any) -> Encoded:
        """Tokens of a conversation."""
        eos = self._tokenizer.eos_token_id if written.appended else None
        if written.appended and eos is None:
            raise Refusal("a turn ends without special token, and the tokenizer has no EOS token")
        text = written.text
        tokens = _Tokens(encoding, self._special, eos)
        mask = np.zeros(len(tokens.ids), bool)
        chosen = np.zeros(len(tokens.ids), bool)
        weights = np.zeros(len(tokens.ids), np.float32)
        special = np.flatnonzero(tokens.special)
        starts = [tokens.span(int(i))[0] for i in special]
        for number, turn in enumerate(written.turns):
            last = number == len(written.turns) - 1
            end = _end_token(text, tokens, special, starts, turn)
            if end is None and not (last and written.appended):
                more = any(t.message == turn.message for t in written.turns[number + 1 :])
                if not more or turn.message is None and last:
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
            if part.start < part.stop and tokens.special[part.start]:
                where[part.start] = tokens.span(part.start)[0] >= turn.start
            if last and written.appended:
                where[-1] = True
            mask |= where
            weights[where] = written.weights[number]
            named = written.critical[number]
            if named is not None and named[1]:
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
        return _encoded(tokens.ids, mask, weights * np.float32(scale) if weighted else None)

    # ---- raw text

    def _text(self, text: Text, encoding: Any) -> Encoded:
        eos = self._tokenizer.eos_token_id
        if eos is None:
            raise UserError(
                f"the tokenizer {self._tokenizer.name_or_path} has no EOS token, which ends a"
                " completion: set its eos_token"
            )
        border = len(text.prompt or "")
        tokens = _Tokens(encoding, self._special)
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
        return _encoded(ids, mask, weights)


def mark_supervised(tokenizer: Any, input_ids: np.ndarray, loss_mask: np.ndarray) -> str:
    """The decoded text of a conversation [n] with its supervised parts in [[...]]."""
    borders = np.flatnonzero(np.diff(loss_mask.astype(np.int8), prepend=0, append=0)).tolist()
    pieces = []
    for start, stop in zip([0, *borders], [*borders, len(input_ids)], strict=True):
        text = tokenizer.decode(input_ids[start:stop].tolist(), clean_up_tokenization_spaces=False)
        pieces.append(f"[[{text}]]" if start < stop and loss_mask[start] else text)
    return "".join(pieces)


def _given(conversation: Conversation) -> dict[str, Any]:
    return {"tools": conversation.tools, "variables": conversation.variables}


def _text_of(part: Written | Text) -> str:
    """What of a part is tokenised: one text, so that nothing is gained at a border."""
    return part.text if isinstance(part, Written) else (part.prompt or "") + part.completion


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise Refusal("the text has half of a surrogate pair, which no tokenizer takes") from None


def _writings(conversation: Conversation) -> list[Conversation]:
    """The ways to write tool calls that templates are made for, the usual one first: arguments as
    objects or as JSON text, an empty content or none."""
    def arguments(message: Message) -> Message:
        calls = []
        for call in message["tool_calls"]:
            holder = call.get("function", call)
            given = holder.get("arguments") if isinstance(holder, dict) else None
            if isinstance(given, dict):
                text = json.dumps(given, ensure_ascii=False)
                inner = {**holder, "arguments": text}
                call = inner if holder is call else {**call, "function": inner}
            calls.append(call)
        return {**message, "tool_calls": calls}

    def silent(message: Message) -> Message:
        return message if message["content"] else {**message, "content": None}

    ways: list[list[Callable[[Message], Message]]] = [[], [arguments], [silent], [silent, arguments]]
    if not any(message.get("tool_calls") for message in conversation.messages):
        return [conversation]
    out = []
    for way in ways:
        messages = list(conversation.messages)
        for change in way:
            messages = [change(m) if m.get("tool_calls") else m for m in messages]
        out.append(replace(conversation, messages=messages))
    return out


def _rounds(conversation: Conversation) -> list[Conversation]:
    """A conversation as one for each question: what follows it up to the next one is learnt."""
    messages = conversation.messages
    out, end = [], 0
    while end < len(messages):
        start = next(
            (i for i in range(end, len(messages)) if messages[i]["role"] == "assistant"),
            len(messages),
        )
        end = next(
            (i for i in range(start, len(messages)) if messages[i]["role"] == "user"),
            len(messages),
        )
        part = replace(
            conversation,
            messages=messages[:end],
            factors=conversation.factors[:end],
            critical=conversation.critical[:end],
            first=max(start, conversation.first),
        )
        if part.learnt:
            out.append(part)
    return out


def _encoded(ids: np.ndarray, mask: np.ndarray, weights: np.ndarray | None) -> Encoded:
    mask = mask.copy()
    mask[:1] = False
    if not mask.any():
        raise Refusal("no supervised token")
    if weights is not None:
        weights = np.where(mask, weights, np.float32(0))
    return Encoded(ids.astype(np.int32), mask, weights)


def _end_token(
    text: str, tokens: _Tokens, special: np.ndarray, starts: list[int], turn: Turn
) -> int | None:
    """Which special token ends a turn: nothing but white space lies between it and the stop; it may
    stand behind the stop, where it is the next role's, but not the one that a turn begins with."""
    own = next((i for i, at in zip(special, starts, strict=True) if at >= turn.written), None)
    inside = [i for i, at in zip(special, starts, strict=True) if turn.start <= at < turn.stop]
    if inside and not text[tokens.span(int(inside[-1]))[1] : turn.stop].strip():
        return int(inside[-1])
    behind = [(i, at) for i, at in zip(special, starts, strict=True) if at >= turn.stop]
    if behind and not text[turn.stop : behind[0][1]].strip():
        index = int(behind[0][0])
        begins = own is not None and tokens.span(int(own))[0] == turn.written
        if not (begins and tokens.ids[index] == tokens.ids[int(own)]):
            return index
    return None


__all__ = ["HISTORY_THINKING", "SUPERVISE", "ChatEncoder", "ChatOptions", "Encoded", "Span"]
