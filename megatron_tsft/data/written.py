"""One conversation -> the text that is tokenised, and which turns of it are supervised.

The text is what the chat template writes of the whole conversation, but for two cases in which the
model was given or has generated something else: a prompt that says more than the finished
conversation does, and the thought of the last turn that the template would cut off.
"""

import datetime
import json
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from megatron_tsft.data.dropped import Frames, Render, dropped_thoughts, protect, restore
from megatron_tsft.data.marked_template import Message, Rendered
from megatron_tsft.data.rows import Conversation, Spans
from megatron_tsft.data.turns import CLOSE, OPEN, REFUSES, ChatTemplate, Refusal, Turn
from megatron_tsft.errors import UserError

HISTORY_THINKING = ("template", "one-row-per-turn", "refuse")
SUPERVISE = ("all", "last", "everything")


@dataclass(frozen=True)
class ChatOptions:
    """How every row is encoded.

    Attributes:
        chat_template: Jinja text in place of the tokenizer's own.
        variables: `chat_template_kwargs` of every row; a row's own win.
        date: the day that templates are told, YYYY-MM-DD; "" is now.
        history_thinking: what happens to a conversation whose template drops the thoughts of
            earlier turns: it stays as the template writes it, becomes a row for each turn, or is
            refused.
        supervise: all assistant turns, the last one, or every token.
    """

    chat_template: str | None = None
    variables: dict[str, Any] = field(default_factory=dict[str, Any])
    date: str = ""
    history_thinking: str = "template"
    supervise: str = "all"

    @property
    def now(self) -> Callable[[str], str] | None:
        """What a template's strftime_now gives, for all rows alike; None for the clock."""
        return datetime.date.fromisoformat(self.date).strftime if self.date else None


@dataclass(frozen=True)
class Written:
    """A conversation as text, before it is tokenised.

    Attributes:
        text: what is tokenised, as a whole.
        turns: the supervised ones, in order.
        weights: of each turn.
        critical: (content, spans) of each turn, None without.
        appends: whether the text ends before the token that ends its last turn, where no special
            token does.
    """

    text: str
    turns: list[Turn]
    weights: list[float]
    critical: list[tuple[str, Spans] | None]
    weight: float | None
    appends: Callable[[], bool]
    everything: bool


class ConversationWriter:
    """Conversations -> texts, with one tokenizer's templates."""

    def __init__(self, tokenizer: Any, plain: Any, special: np.ndarray, options: ChatOptions):
        """Args:
        tokenizer: transformers'.
        plain: its backend without a post-processor.
        special: the ids of special tokens, sorted.
        """
        self._tokenizer, self._plain, self._special = tokenizer, plain, special
        self._options = options
        self._templates: dict[str, ChatTemplate] = {}
        self._ends: dict[str, bool] = {}
        self._frames = defaultdict[str, Frames](Frames)

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
                lambda text: [
                    end for _, end in self._plain.encode(text, add_special_tokens=False).offsets
                ],
                dict(tokenizer.special_tokens_map),
                self._options.now,
            )
        return self._templates[source]

    def texts(self, conversation: Conversation) -> list[Written]:
        """The texts of a conversation: one, or with one-row-per-turn several."""
        if self._options.supervise == "last":
            last = conversation.learnt[-1]
            factors = [f if i >= last else 0.0 for i, f in enumerate(conversation.factors)]
            conversation = replace(conversation, factors=factors)
        variables = self._options.variables | conversation.variables
        conversation = replace(conversation, variables=variables)
        refusals: list[Refusal] = []
        for ways in _writings(conversation):
            found: list[list[Written]] = []
            for candidate in ways:
                try:
                    found.append(self._write(candidate))
                except Refusal as refusal:
                    refusals.append(refusal)
            if found:
                return min(found, key=_size)
        # why the template could not be used says more than why one way of writing failed
        raise next((r for r in refusals if not r.reason.startswith(REFUSES)), refusals[0])

    def _write(self, conversation: Conversation) -> list[Written]:
        template = self._template(conversation)
        messages, given = conversation.messages, _given(conversation)
        rendered = template.locate(messages, **given)
        try:
            lost = dropped_thoughts(
                conversation, rendered, _with_tools(template, given), self._frames[template.source]
            )
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
                    " where it reads one (gpt-oss: `thinking`; others: the content, as"
                    " <think>...</think>), or give a template that writes it (--chat-template)"
                )
            rendered = self._with_thought(template, conversation, last)
        return [self._finished(template, conversation, rendered)]

    def _with_thought(
        self, template: ChatTemplate, conversation: Conversation, last: int
    ) -> Rendered:
        """The conversation with the thought of the last turn, which the template would cut off:
        the model generates it behind the generation prompt."""
        messages, given = conversation.messages, _given(conversation)
        prompted = template.prompted(messages[:last], **given)
        content = messages[last]["content"]
        before, opened, thought = content.rpartition(OPEN)
        begun = prompted.rfind(OPEN)
        if begun >= 0 and not prompted[begun + len(OPEN) :].strip() and not before.strip():
            # the generation prompt has opened it, perhaps with white space of its own
            content = prompted[begun:] + thought.lstrip()
        elif not opened:
            content = f"{OPEN}\n{content}"
        message = messages[last] | {"content": protect(content)}
        rendered = template.locate([*messages[:last], message, *messages[last + 1 :]], **given)
        at = rendered.text.rfind(protect(content).strip())
        rendered = replace(rendered, text=restore(rendered.text))
        follows = rendered.text.startswith(prompted) and 0 <= at
        if not follows or rendered.text[len(prompted) : at].strip() or _closed(prompted):
            raise Refusal(
                "the chat template drops the thought of the last turn, and its generation prompt"
                " has no place for one, with these chat_template_kwargs: leave the thought out, or"
                " give another template (--chat-template)"
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
            conversation,
            messages=prompt,
            factors=conversation.factors[:first],
            critical=conversation.critical[:first],
        )
        prompting = _with_tools(template, given | {"add_generation_prompt": True})
        served, frames = prompting(prompt, conversation.tools), self._frames[template.source]
        dropped_thoughts(asked, served, prompting, frames)
        finished = _with_tools(template, given)
        completion = range(first, len(conversation.messages))
        if dropped_thoughts(conversation, rendered, finished, frames, completion):
            raise Refusal("the chat template drops the thought of the completion")
        if conversation.messages[first]["role"] != "assistant":
            raise Refusal("the completion does not begin with an assistant message")
        written = self._finished(template, conversation, rendered)
        beginning = template.turns(rendered, conversation.messages, [first], **given)[0]
        begin = beginning.start
        if not served.text.endswith(rendered.text[beginning.written : begin]):
            raise Refusal("the chat template begins the completion otherwise than its prompt ends")
        shift = len(served.text) - begin
        turns = [
            replace(t, start=t.start + shift, stop=t.stop + shift, written=t.start + shift)
            for t in written.turns
        ]
        return replace(written, text=served.text + rendered.text[begin:], turns=turns)

    def _finished(
        self, template: ChatTemplate, conversation: Conversation, rendered: Rendered
    ) -> Written:
        text, messages, given = rendered.text, conversation.messages, _given(conversation)
        check_text(text)
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
            content = "" if place is None else messages[place]["content"] or ""
            critical.append((content, spans or []) if named else None)
        weighted = any(factor != 1 for factor in weights)
        weight = conversation.weight
        return Written(
            text,
            turns,
            weights,
            critical,
            1.0 if weight is None and weighted else weight,
            partial(self._appends, template, conversation, text, turns[-1]),
            self._options.supervise == "everything",
        )

    def _appends(
        self,
        template: ChatTemplate,
        conversation: Conversation,
        text: str,
        turn: Turn,
    ) -> bool:
        """Whether the end token of the text's last turn is the one that the next role would begin
        with, and the text ends before it."""
        if text[turn.stop :].strip() or turn.message is None:
            return False
        if template.source not in self._ends:
            behind = template.behind_last(conversation.messages, **_given(conversation))
            if behind is None:
                return False
            own = text[turn.written : turn.stop]
            following, first = (
                self._plain.encode(part.lstrip(), add_special_tokens=False).ids
                for part in (behind, own)
            )
            self._ends[template.source] = bool(
                following and self._special[following[0]] and following[0] != first[0]
            )
        return self._ends[template.source]


def _with_tools(template: ChatTemplate, given: dict[str, Any]) -> Render:
    """What the template writes of other messages with other tools."""
    return lambda messages, tools: template.locate(messages, **{**given, "tools": tools})


def _given(conversation: Conversation) -> dict[str, Any]:
    return {"tools": conversation.tools, "variables": conversation.variables}


def _closed(prompted: str) -> bool:
    """Whether a generation prompt has closed the thought."""
    return prompted.rstrip().endswith(CLOSE)


def check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise Refusal("the text has half of a surrogate pair, which no tokenizer takes") from None


def _size(texts: list[Written]) -> int:
    """How much a template writes, white space aside: of equal ones the first is taken."""
    return sum(len("".join(written.text.split())) for written in texts)


def _writings(conversation: Conversation) -> list[list[Conversation]]:
    """The ways to write tool calls that templates are made for, the usual ones first: arguments as
    objects or as JSON text; each of these with an empty content as it was given and the other way
    (null or ""), of which a template may write more: "None", or an empty answer behind the call."""

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

    def other(message: Message) -> Message:
        if message["content"]:
            return message
        return {**message, "content": "" if message["content"] is None else None}

    def changed(*changes: Callable[[Message], Message]) -> Conversation:
        messages = list(conversation.messages)
        for change in changes:
            messages = [change(m) if m.get("tool_calls") else m for m in messages]
        return replace(conversation, messages=messages)

    calling = [m for m in conversation.messages if m.get("tool_calls")]
    if not calling:
        return [[conversation]]
    if all(m["content"] for m in calling):
        return [[conversation], [changed(arguments)]]
    return [[conversation, changed(other)], [changed(arguments), changed(arguments, other)]]


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
