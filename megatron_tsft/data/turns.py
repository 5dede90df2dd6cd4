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
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_tsft.data.marked_template import MarkedTemplate, Message, Rendered, Span
from megatron_tsft.errors import UserError

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
    """

    message: int | None
    start: int
    stop: int
    written: int


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
        return [self._turn(rendered, messages, i, given) for i in wanted]

    def _turn(
        self, rendered: Rendered, messages: list[Message], i: int, given: dict[str, Any]
    ) -> Turn:
        spans = rendered.messages.get(i, [])
        if len(spans) != 1:
            raise Refusal(
                "the chat template writes an assistant message "
                + ("in several places" if spans else "outside a loop over the messages")
                + ", so its turn cannot be told: use a template with {% generation %} blocks"
            )
        [span] = spans
        start = span.start + self._header(rendered.text, span, messages, i, given)
        return Turn(i, start, span.stop, span.start)

    def _blocks(
        self, rendered: Rendered, messages: list[Message], wanted: list[int], given: dict[str, Any]
    ) -> list[Turn]:
        turns = []
        for message, block in rendered.generated:
            if message is None:
                turns.append(Turn(None, block.start, block.stop, block.start))
            elif message in wanted:
                written = rendered.messages[message][0].start
                start = block.start
                span = Span(written, block.stop)
                if all(turn.message != message for turn in turns):  # its first block
                    header = self._prompt(messages, message, given)
                    start = max(start, written + self._common(rendered.text, span, header))
                if start < block.stop:
                    turns.append(Turn(message, start, block.stop, written))
        return turns

    def _header(
        self, text: str, span: Span, messages: list[Message], i: int, given: dict[str, Any]
    ) -> int:
        """How many characters of a turn are its header."""
        prompt = self._prompt(messages, i, given)
        common = self._common(text, span, prompt)
        if common or (prompt and text.endswith(prompt, 0, span.start)):
            return common
        return self._common(text, span, self._before_values(messages, i, given))

    def _common(self, text: str, span: Span, prompt: str) -> int:
        """How many characters at the beginning of a span are those of whole tokens of `prompt`."""
        length = min(len(prompt), span.stop - span.start)
        found = next((k for k in range(length) if text[span.start + k] != prompt[k]), length)
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


def _key(given: dict[str, Any], *more: str) -> str:
    """What beside the conversation decides a generation prompt."""
    return json.dumps([bool(given.get("tools")), given.get("variables"), *more], default=str)
