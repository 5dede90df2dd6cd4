"""Where the assistant's turns lie in a conversation that the chat template has rendered.

A turn is what the template's loop writes for one assistant message (marked_template.py). Supervised
is what the model would have to generate of it:

    header | answer, calls, thought | end token | white space
             ^ start                            ^ stop is somewhere behind the end token

The header is what the turn has in common with the generation prompt, in whole tokens: a finished
turn may differ from it (the prompt opens <think>, the turn has no thought). Without a generation
prompt the header is what the loop's body writes before the first of the message's own values; white
space there is what the model itself writes. {% generation %} blocks win where a template has them,
less what the generation prompt writes at their beginning.
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_tsft.data.marked_template import MarkedTemplate, Message, Rendered, Span
from megatron_tsft.errors import UserError

OPEN, CLOSE = "<think>", "</think>"
# where a message's thought stands beside its content
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
PROBE = "0a1b2c3d4e5f"
QUESTION: Message = {"role": "user", "content": "question"}
REFUSES = "the chat template refuses it"
# what a template may raise while it renders a conversation that it was not written for
FAILURES = (TypeError, ValueError, AttributeError, LookupError, ArithmeticError)
# (text) -> where its tokens end, in characters
Borders = Callable[[str], list[int]]


class Refusal(Exception):
    """One conversation cannot be used; `reason` has few values in a file, so that refusals can be
    counted by it."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.detail = detail  # of this conversation alone


@dataclass(frozen=True)
class Turn:
    """Supervised characters [start, stop) of the text, not yet cut at the end token.

    Attributes:
        message: the message's place in the conversation; None of a {% generation %} block outside
            the loop over the messages.
        written: where the message's whole text begins, its header included.
        cut: other messages follow within the turn, and what they begin with ends this part.
    """

    message: int | None
    start: int
    stop: int
    written: int
    cut: bool = False


def content_place(text: str, start: int, stop: int, content: str) -> Span | None:
    """Where `content`, which templates may strip, lies in text[start:stop]; None = not certain.

    Certain is the last thing before `stop`, or what occurs once. The place's start belongs to
    content[0] also where the template stripped leading space, so that offsets into `content` can be
    added to it.
    """
    stripped = content.strip()
    at = text.rfind(stripped, start, stop)
    if not stripped or at < 0:
        return None
    if text[at + len(stripped) : stop].strip() and text.count(stripped, start, stop) > 1:
        return None
    first = at - content.index(stripped)
    return Span(first, first + len(content))


class ChatTemplate:
    """One chat template with the variables that every conversation gets."""

    def __init__(
        self,
        source: str,
        name: str,
        borders: Borders,
        variables: dict[str, Any],
        now: Callable[[str], str] | None = None,
    ) -> None:
        """Args:
            source: Jinja text.
            name: whose template it is, for errors.
            borders: of the tokenizer.
            variables: what the template sees beside the conversation (special tokens).
            now: see MarkedTemplate.

        Raises:
            UserError: the template is no valid Jinja.
        """
        from jinja2.exceptions import TemplateSyntaxError

        try:
            self.template = MarkedTemplate(source, now)
        except TemplateSyntaxError as error:
            raise UserError(
                f"the chat template of {name} is no valid Jinja (line {error.lineno}:"
                f" {error.message}): correct its chat_template.jinja"
            ) from error
        self.source = source
        self._borders = borders
        self._variables = variables
        self._prompts: dict[Any, str] = {}
        self._headers: dict[Any, str] = {}

    def locate(self, messages: list[Message], **given: Any) -> Rendered:
        """The text of a finished conversation and where each message lies in it; `given` are
        `tools` and the row's own variables.

        Raises:
            Refusal: the template refuses the conversation.
        """
        return self._guarded(self.template.locate, messages, given)

    def render(self, messages: list[Message], **given: Any) -> str:
        """The text alone."""
        return self._guarded(self.template.render, messages, given)

    def prompted(self, messages: list[Message], **given: Any) -> str:
        """The text that the model is given to answer these messages."""
        given = given | {"add_generation_prompt": True}
        return self._guarded(self.template.render, messages, given)

    def turns(
        self, rendered: Rendered, messages: list[Message], wanted: list[int], **given: Any
    ) -> list[Turn]:
        """The turns of the assistant messages `wanted`, in the text's order.

        Raises:
            Refusal: a turn cannot be told exactly.
        """
        if self.template.has_generation:
            return self._blocks(rendered, messages, wanted, given)
        return [turn for i in wanted for turn in self._turns(rendered, messages, i, given)]

    def _turns(
        self, rendered: Rendered, messages: list[Message], i: int, given: dict[str, Any]
    ) -> list[Turn]:
        """Message i's turn; in several parts where other messages are written within it."""
        text = rendered.text
        spans = [s for s in rendered.messages.get(i, []) if text[s.start : s.stop].strip()]
        others = [s for j, found in rendered.messages.items() if j != i for s in found]
        if len(spans) > 1:  # what is written of it within another message is that message's
            spans = [s for s in spans if not any(_within(s, other) for other in others)]
        if len(spans) != 1:
            behind = self._behind_loop(rendered, messages, i, given) if not spans else None
            if behind is None:
                raise Refusal(
                    "the chat template writes an assistant message "
                    + ("in several places" if spans else "outside a loop over the messages")
                    + ", so its turn cannot be told: use a template with {% generation %} blocks"
                )
            return [behind]
        [span] = spans
        start = span.start + self._header(text, span, messages, i, given)
        # Gemma 4 writes the results of a call within the turn that calls
        turns, written = [], span.start
        for other in sorted(others, key=lambda other: other.start):
            if not _within(other, span) or other.stop <= start:
                continue
            if text[start : other.start].strip():
                turns.append(Turn(i, start, other.start, written, cut=True))
            start = written = max(start, other.stop)
        if not turns or text[start : span.stop].strip():
            turns.append(Turn(i, start, span.stop, written))
        return turns

    def _behind_loop(
        self, rendered: Rendered, messages: list[Message], i: int, given: dict[str, Any]
    ) -> Turn | None:
        """The last message's turn, where the template writes it behind its loop and just as the
        generation prompt of the messages before it goes on."""
        if i + 1 < len(messages) or not i:
            return None
        try:
            prompted = self.prompted(messages[:i], **given)
        except Refusal:
            return None
        if not rendered.text.startswith(prompted):
            return None
        before = max((s.stop for found in rendered.messages.values() for s in found), default=0)
        return Turn(i, len(prompted), len(rendered.text), before)

    def _blocks(
        self, rendered: Rendered, messages: list[Message], wanted: list[int], given: dict[str, Any]
    ) -> list[Turn]:
        turns = []
        for message, block in rendered.generated:
            if message is None:
                turns.append(Turn(None, block.start, block.stop, block.start))
            elif message in wanted:
                written = max(s.start for s in rendered.messages[message] if s.start <= block.start)
                start, span = block.start, Span(written, block.stop)
                if all(turn.message != message for turn in turns):  # its first block
                    header = self._prompted_header(rendered.text, span, messages, message, given)
                    start = max(start, written + header)
                if start < block.stop:
                    turns.append(Turn(message, start, block.stop, written))
        return turns

    def _header(
        self, text: str, span: Span, messages: list[Message], i: int, given: dict[str, Any]
    ) -> int:
        """How many characters of a turn are its header."""
        prompt = self._prompt(messages, i, given)
        common = self._prompted_header(text, span, messages, i, given)
        if common or (prompt and text.endswith(prompt, 0, span.start)):
            return common
        return self._common(text, span, self._before_values(messages, i, given))

    def _prompted_header(
        self, text: str, span: Span, messages: list[Message], i: int, given: dict[str, Any]
    ) -> int:
        """How many characters at the beginning of a turn the model is given, and does not write.

        Raises:
            Refusal: the generation prompt closes a thought that the turn has.
        """
        prompt = self._prompt(messages, i, given)
        common = self._common(text, span, prompt)
        if prompt and common == len(prompt):
            return common
        if prompt and not i:  # a first message may stand behind a system message of the template
            at = text.find(prompt, span.start, span.stop)
            content = text.rfind((messages[i].get("content") or "").strip(), span.start, span.stop)
            if span.start < at < content:
                return at - span.start + len(prompt)
        if common:
            return self._parting(text, span, prompt, common, messages[i])
        behind = self._behind_finished(messages, i, given)
        if not behind.strip() or not text.startswith(behind, span.start, span.stop):
            return 0
        follows = self._common(text, Span(span.start + len(behind), span.stop), prompt)
        return len(behind) + follows if follows or not prompt else 0

    def _parting(self, text: str, span: Span, prompt: str, common: int, message: Message) -> int:
        """The header of a turn that goes on otherwise than the prompt, behind `common`
        characters."""
        rest, written = prompt[common:], text[span.start + common : span.stop]
        if CLOSE in rest and CLOSE in written:
            if written[: written.index(CLOSE)].replace(OPEN, "").strip():
                raise Refusal(
                    "the generation prompt closes the thought, and the row has one: set"
                    " chat_template_kwargs for thinking, or leave the thought out"
                )
            ends = [part.index(CLOSE) + len(CLOSE) for part in (written, rest)]
            behind, prompted = written[ends[0] :], rest[ends[1] :]
            return common + ends[0] + len(os.path.commonprefix([behind, prompted]))
        # an answer may begin as the prompt goes on ("<svg>", "<think>"); a mark that the prompt has
        # whole is the prompt's
        for key in ("content", *THOUGHTS):
            value = message.get(key)
            value = value.strip() if isinstance(value, str) else ""
            at = text.rfind(value, span.start, span.stop) - span.start if value else -1
            if 0 <= at < common and not prompt[at:common].startswith(OPEN):
                common = at
        return common

    def _common(self, text: str, span: Span, prompt: str) -> int:
        """How many characters at the beginning of a span are those of whole tokens of `prompt`."""
        begins = text[span.start : min(span.stop, span.start + len(prompt))]
        found = len(os.path.commonprefix([begins, prompt]))
        if found == len(prompt):
            return found
        return max((b for b in self._borders(prompt) if b <= found), default=0)

    def _prompt(self, messages: list[Message], i: int, given: dict[str, Any]) -> str:
        """What add_generation_prompt adds before message i; "" where it cannot be told."""
        if not self.template.prompt_is_constant:
            return self._added([messages[:i], [QUESTION]], given) or ""
        key = _key(given)
        if key not in self._prompts:  # of any conversation; kept once it is known
            found = self._added([[QUESTION], messages[:i]], given)
            if found is None:
                return ""
            self._prompts[key] = found
        return self._prompts[key]

    def _added(self, contexts: list[list[Message]], given: dict[str, Any]) -> str | None:
        """What add_generation_prompt adds behind the first of some conversations that the template
        takes."""
        for before in filter(None, contexts):
            try:
                asked = self._guarded(
                    self.template.locate, before, given | {"add_generation_prompt": True}
                )
                finished = self.render(before, **given)
            except Refusal:
                continue
            if asked.text.startswith(finished):
                return asked.text[len(finished) :]
            # something else ends a finished conversation (Phi-3: EOS)
            spans = [span for found in asked.messages.values() for span in found]
            return asked.text[max((span.stop for span in spans), default=0) :]
        return None

    def _before_values(self, messages: list[Message], i: int, given: dict[str, Any]) -> str:
        """What the loop's body writes before the first of message i's own values; "" for white
        space and where it cannot be told."""
        key = _key(given, messages[i - 1]["role"] if i else "")
        if key in self._headers:
            return self._headers[key]
        for before in (messages[:i], [QUESTION]):
            try:
                rendered = self.locate([*before, {"role": "assistant", "content": PROBE}], **given)
            except Refusal:
                continue
            spans = rendered.messages.get(len(before), [])
            at = rendered.text.find(PROBE)
            if len(spans) == 1 and spans[0].start <= at:
                header = rendered.text[spans[0].start : at]
                self._headers[key] = header if header.strip() else ""
                return self._headers[key]
        return ""

    def _behind_finished(self, messages: list[Message], i: int, given: dict[str, Any]) -> str:
        """What a finished conversation of the messages before i has behind them: the prompt of
        templates that always write one, or the end of a tool's results; "" where it cannot be
        told."""
        if not i:
            return ""
        key = _key(given, "finished", messages[i - 1]["role"])
        if key not in self._headers:
            self._headers[key] = ""
            try:
                rendered = self.locate(messages[:i], **given)
            except Refusal:
                return ""
            spans = rendered.messages.get(i - 1, [])
            if spans:
                self._headers[key] = rendered.text[spans[-1].stop :]
        return self._headers[key]

    def behind_last(self, messages: list[Message], **given: Any) -> str | None:
        """What the template writes behind the last message once a user answers; None where it
        cannot be told."""
        try:
            longer = self.locate([*messages, {"role": "user", "content": PROBE}], **given)
        except Refusal:
            return None
        spans = longer.messages.get(len(messages) - 1, [])
        return longer.text[spans[-1].stop :] if spans else None

    def _guarded(self, render: Any, messages: list[Message], given: dict[str, Any]) -> Any:
        """`render(...)`; what a template raises becomes a refusal of this conversation."""
        from jinja2.exceptions import TemplateError

        given = {"tools": None, "documents": None, "add_generation_prompt": False} | given
        variables = given.pop("variables", {})
        try:
            return render(messages, **self._variables, **(given | variables))
        except (TemplateError, RecursionError, *FAILURES) as error:
            raise Refusal(f"{REFUSES}: {str(error)[:120]}") from error


def _within(inner: Span, outer: Span) -> bool:
    return outer.start <= inner.start and inner.stop <= outer.stop


def _key(given: dict[str, Any], *more: str) -> str:
    """What beside the conversation decides a generation prompt."""
    return json.dumps([bool(given.get("tools")), given.get("variables"), *more], default=str)
