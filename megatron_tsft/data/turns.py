"""Where the assistant's turns lie in a conversation that the chat template has rendered.

Two ways, both exact; a conversation for which neither can be is refused, with the reason:

1. The template has {% generation %} blocks: its author says what the assistant writes.
2. It has none. Turn i starts where `messages[:i]` rendered with the generation prompt ends, and
   stops where `messages[:i+1]` ends; each must be a prefix of the whole text. Where the second is
   not, because the template treats the last message specially (Phi-3 appends an EOS, Qwen3 an empty
   <think>), the turn must begin with the message's content, whole, and ends with the special token
   that follows it. Thinking that the template drops is refused. A template without generation
   prompt may write the role as part of the turn: what it writes between the prompt and the content
   of a probe is not supervised.
"""

import re
from dataclasses import dataclass
from typing import Any

from megatron_tsft.errors import UserError

Message = dict[str, Any]
PROBE = "0a1b2c3d4e5f"
GENERATION_BLOCK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


class Refusal(Exception):
    """One conversation cannot be used; `reason` has few values in a file, so that refusals can be
    counted by it."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.detail = detail  # of this conversation alone


@dataclass(frozen=True)
class Turn:
    """Characters [start, stop) of the text that the template gives to one assistant turn, not yet
    cut at its end token.

    message: index in the conversation; None where the template has more or fewer blocks than
        assistant messages.
    open: the end token may also be the first special token behind `stop`.
    """

    message: int | None
    start: int
    stop: int
    open: bool


@dataclass(frozen=True)
class TextSpan:
    """Characters [start, stop) of a text."""

    start: int
    stop: int


def content_place(text: str, start: int, stop: int, content: str) -> TextSpan | None:
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
    return TextSpan(first, first + len(content))


class ChatTemplate:
    """The chat template of one tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        """Raises UserError where the tokenizer has no chat template."""
        self._tokenizer = tokenizer
        self._headers: dict[str, str] = {}  # template -> header
        if not tokenizer.chat_template:
            raise UserError(
                f"the tokenizer {tokenizer.name_or_path} has no chat template, which `messages`"
                " need: add its chat_template.jinja, or write rows of `prompt` and `completion`"
            )

    def turns(self, messages: list[Message], tools: list[Any] | None) -> tuple[str, list[Turn]]:
        """The whole text and its assistant turns in order.

        Raises:
            Refusal: the template refuses the conversation, or the turns cannot be told exactly.
            UserError: the template itself is broken.
        """
        template = self._tokenizer.get_chat_template(None, tools)
        if tools and "tools" not in template:
            raise Refusal("the row has `tools`, which the chat template does not use")
        if GENERATION_BLOCK.search(template):
            return self._blocks(template, messages, tools)
        text = self._render(messages, tools)
        header = self._header(template, tools)
        turns = []
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            if i == 0:
                raise Refusal(
                    "the first message is the assistant's: this template tells no prompt apart"
                    " from it"
                )
            prompt = self._render(messages[:i], tools, add_generation_prompt=True) + header
            if not text.startswith(prompt):
                raise Refusal(
                    "the chat template renders the prompt of an assistant turn differently than"
                    " within the whole conversation: use a template with {% generation %} blocks,"
                    " or one row per turn"
                )
            through = self._render(messages[: i + 1], tools)
            if text.startswith(through):
                turns.append(Turn(i, len(prompt), len(through), open=False))
            else:
                turns.append(_opened_by_content(text, len(prompt), i, message, template))
        return text, turns

    def _header(self, template: str, tools: list[Any] | None) -> str:
        """What a template without generation prompt writes between the prompt and an answer; "" for
        white space."""
        if "add_generation_prompt" in template:
            return ""
        if template not in self._headers:
            question, answer = (
                {"role": "user", "content": "question"},
                {"role": "assistant", "content": PROBE},
            )
            prompt, text = self._render([question], tools), self._render([question, answer], tools)
            if not text.startswith(prompt) or text.count(PROBE) != 1:
                raise Refusal(
                    "the chat template has no generation prompt, and where an answer begins cannot"
                    " be told"
                )
            header = text[len(prompt) : text.index(PROBE)]
            self._headers[template] = (
                header if header.strip() else ""
            )  # space is what the model itself writes
        return self._headers[template]

    def _blocks(
        self, template: str, messages: list[Message], tools: list[Any] | None
    ) -> tuple[str, list[Turn]]:
        """Turns from the {% generation %} blocks.

        `apply_chat_template(return_assistant_tokens_mask=True)` marks the tokens of these
        characters, but leaves out the rest of a last character that takes several tokens: so the
        characters are asked for, not its tokens.
        """
        from transformers.utils.chat_template_utils import render_jinja_template

        texts, spans = self._guarded(
            render_jinja_template,
            conversations=[messages],
            tools=tools,
            chat_template=template,
            return_assistant_tokens_mask=True,
            **self._tokenizer.special_tokens_map,
        )
        spoken = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        spans = [span for span in spans[0] if span[1] > span[0]]
        if len(spans) != len(spoken):
            return texts[0], [Turn(None, *span, open=True) for span in spans]
        return texts[0], [Turn(i, *span, open=True) for i, span in zip(spoken, spans, strict=True)]

    def _render(
        self,
        messages: list[Message],
        tools: list[Any] | None,
        *,
        add_generation_prompt: bool = False,
    ) -> str:
        return self._guarded(
            self._tokenizer.apply_chat_template,
            messages,
            tools=tools,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )

    def _guarded(self, render: Any, *args: Any, **keywords: Any) -> Any:
        """`render(...)`; what a template raises becomes a refusal of this conversation."""
        from jinja2.exceptions import TemplateError, TemplateSyntaxError

        try:
            return render(*args, **keywords)
        except TemplateSyntaxError as error:
            raise UserError(
                f"the chat template of {self._tokenizer.name_or_path} is no valid Jinja (line"
                f" {error.lineno}: {error.message}): correct its chat_template.jinja"
            ) from error
        except (
            TemplateError,
            TypeError,
            ValueError,
            KeyError,
            AttributeError,
            RecursionError,
        ) as error:
            raise Refusal(f"the chat template refuses it: {str(error)[:120]}") from error


def _opened_by_content(text: str, start: int, index: int, message: Message, template: str) -> Turn:
    """The turn that begins with the message's content, which must be all that it has."""
    content = message["content"].strip()
    start_of_content = start + len(text[start:]) - len(text[start:].lstrip())
    dropped = [key for key in message if key not in ("role", "content") and key in template]
    if not content or dropped or not text.startswith(content, start_of_content):
        raise Refusal(
            "the chat template renders an assistant turn differently once others follow (it may"
            " drop its thinking): use a template with {% generation %} blocks, or one row per turn"
        )
    return Turn(index, start, start_of_content + len(content), open=True)
