"""A row of the input -> one `Conversation` or `Text`: its keys checked and made the same whatever
the file's format, so that nothing after this room looks at a raw row. What is wrong or not known is
refused by name.

Nulls are missing keys at every depth, because Arrow writes null for a key that another row has.
"""

import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megatron_tsft import plain_json
from megatron_tsft.data.marked_template import Message
from megatron_tsft.data.turns import THOUGHTS, Refusal
from megatron_tsft.names import did_you_mean

Spans = list[tuple[int, int]]
# keys of a message that are ours, not the template's
OF_MESSAGES = ("critical", "weight", "loss", "train")
# keys of a row that are ours
OF_ROWS = ("weight", "critical", "chat_template_kwargs")
# a key of this kind that is not known decides what is learnt in the user's mind: never ignored
LOSS_LIKE = re.compile(r"(^|_)(loss|losses|train|trainable|mask|masked|weights?|learn)(_|$)", re.I)
# what calls and tools may be written as: JSON text
_WRITTEN = (str, bytes)


@dataclass(frozen=True)
class Conversation:
    """A conversation for the chat template.

    Attributes:
        messages: as the template gets them.
        first: of the messages from this place on the assistant's are learnt.
        factors: what each message's tokens weigh beside the row's `weight`; 0 = context only.
        critical: spans of each message's content, None without.
        tools: JSON schemas, None without.
        variables: of the template, `chat_template_kwargs` of the row.
        weight: of all tokens, None without.
    """

    messages: list[Message]
    first: int
    factors: list[float]
    critical: list[Spans | None]
    tools: list[Any] | None = None
    variables: dict[str, Any] = field(default_factory=dict[str, Any])
    weight: float | None = None

    @property
    def learnt(self) -> list[int]:
        """The assistant messages that are learnt."""
        return [
            i
            for i, message in enumerate(self.messages)
            if i >= self.first and message["role"] == "assistant" and self.factors[i]
        ]


@dataclass(frozen=True)
class Text:
    """Raw text, of which the completion is learnt; `prompt` is None where there is none, and all
    tokens are."""

    prompt: str | None
    completion: str
    critical: Spans | None
    weight: float | None


def read_row(row: dict[str, Any]) -> Conversation | Text:
    """Raises Refusal: the row cannot be used, by the key that is wrong."""
    row = without_nulls(row)
    weight = read_weight(row)
    _check_known(row, ("weight",), "the row")
    if "messages" in row:
        return _conversation(_with_system(_messages(row["messages"]), row), 0, row, weight)
    if "prompt" in row and "completion" in row:
        prompt, completion = row["prompt"], row["completion"]
        if isinstance(prompt, str) and isinstance(completion, str):
            if not completion.strip():
                raise Refusal("the completion is empty")
            if str(row.get("system") or "").strip():
                raise Refusal("the row has `system`, for which raw text has no place: leave it out")
            return Text(prompt, completion, read_critical(row, completion), weight)
        if isinstance(prompt, list) and isinstance(completion, list):
            before = _with_system(_messages(prompt), row)
            after = _messages(completion)
            return _conversation(before + after, len(before), row, weight)
        raise Refusal("`prompt` and `completion` are neither two strings nor two lists of messages")
    if isinstance(row.get("text"), str):
        if not row["text"].strip():
            raise Refusal("the text is empty")
        return Text(None, row["text"], read_critical(row, row["text"]), weight)
    raise Refusal("neither `messages`, nor `prompt` and `completion`, nor `text`")


def without_nulls(value: Any) -> Any:
    """Without the keys whose value is null, at every depth."""
    if isinstance(value, dict):
        return {key: without_nulls(entry) for key, entry in value.items() if entry is not None}
    if isinstance(value, list):
        return [without_nulls(entry) for entry in value]
    return value


def read_weight(holder: dict[str, Any]) -> float | None:
    """`weight` of a row or a message; None without it. Negative ones are stored: a run refuses
    them until its objective takes them."""
    value = holder.get("weight")
    if value is None:
        return None
    if type(value) not in (int, float) or not abs(value) <= float(np.finfo(np.float32).max):
        raise Refusal("`weight` is not a number")
    return float(value)


def read_critical(holder: dict[str, Any], content: str) -> Spans | None:
    """`critical` of a row or a message; None without it."""
    if "critical" not in holder:
        return None
    spans = holder["critical"]
    pairs = isinstance(spans, list) and all(
        isinstance(span, list) and len(span) == 2 and all(type(offset) is int for offset in span)
        for span in spans
    )
    if not pairs or not all(0 <= start < end <= len(content) for start, end in spans):
        raise Refusal(
            "`critical` is not a list of [start, end) with 0 <= start < end <= characters of the"
            " text"
        )
    return [(start, end) for start, end in spans]


def _messages(value: Any) -> list[Message]:
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise Refusal("the messages are not a list of objects")
    return [_message(message) for message in value]


def _message(message: Message) -> Message:
    """A message with text as content and objects as arguments of its calls."""
    message = dict(message)
    if not isinstance(message.get("role"), str):
        raise Refusal("a message has no `role`")
    assistant = message["role"] == "assistant"
    if "function_call" in message:  # OpenAI's earlier form of one call
        call = parsed(message.pop("function_call"), "function_call", dict)
        message.setdefault("tool_calls", [{"type": "function", "function": call}])
    if message["role"] == "function":
        message["role"] = "tool"
    calls = message.get("tool_calls")
    if calls is not None:
        message["tool_calls"] = [_call(call) for call in parsed(calls, "tool_calls", list)]
    if not message.get("tool_calls"):
        message.pop("tool_calls", None)
    content = message.get("content")
    if isinstance(content, list):
        message["content"] = _joined(content)
    if content is None and assistant:
        # null beside tool calls or a thought, as OpenAI's format writes it
        message["content"] = None if message.get("tool_calls") else ""
    elif not isinstance(message.get("content"), str):
        raise Refusal("a message's `content` is neither a string nor a list of text parts")
    for key in THOUGHTS:
        if isinstance(message.get(key), list):
            message[key] = _joined(message[key])
    if not assistant and "critical" in message:
        raise Refusal("`critical` stands in a message that is not the assistant's")
    _check_known(message, OF_MESSAGES, "a message")
    return message


def _joined(parts: list[Any]) -> str:
    """The text of content parts."""
    texts = []
    for part in parts:
        if isinstance(part, str):
            texts.append(part)
        elif isinstance(part, dict) and isinstance(part.get("text"), str):
            if part.get("type", "text") != "text" and "content" not in part:
                raise Refusal(f"a content part is of type '{part['type']}', not text")
            texts.append(part["text"])
        else:
            kind = part.get("type") if isinstance(part, dict) else None
            raise Refusal(f"a content part is of type '{kind}', not text")
    return "".join(texts)


def _call(call: Any) -> Any:
    """A tool call with `arguments` as an object where its JSON text is one."""
    if not isinstance(call, dict):
        raise Refusal("`tool_calls` is not a list of objects")
    call = dict(call)
    for holder in (call, call.get("function")):
        if isinstance(holder, dict) and isinstance(holder.get("arguments"), _WRITTEN):
            try:
                parsed = plain_json.parse(holder["arguments"])
            except ValueError:
                continue  # text that is no JSON is the argument
            if isinstance(parsed, dict):
                arguments = {"arguments": without_nulls(parsed)}
                if holder is call:
                    call |= arguments
                else:
                    call["function"] = {**holder, **arguments}
    return call


def parsed(value: Any, key: str, kind: type) -> Any:
    """A value that may be given as JSON text.

    Raises:
        Refusal: by `key`: no JSON, or none of `kind`.
    """
    if isinstance(value, _WRITTEN):
        try:
            value = plain_json.parse(value)
        except ValueError as error:
            raise Refusal(f"`{key}` is text that is no JSON") from error
    if not isinstance(value, kind):
        raise Refusal(f"`{key}` is not a {'list' if kind is list else 'JSON object'}")
    return value


def _conversation(
    messages: list[Message], first: int, row: dict[str, Any], weight: float | None
) -> Conversation:
    if "critical" in row:
        raise Refusal(
            "`critical` stands in the row: write it into the assistant message whose offsets it has"
        )
    tools = _tools(row)
    variables = parsed(row.get("chat_template_kwargs", {}), "chat_template_kwargs", dict)
    check_variables(variables)
    factors = [_factor(message) for message in messages]
    if not any(m["role"] == "assistant" for m in messages[first:]):
        raise Refusal("no assistant turn")
    if not any(m["role"] == "assistant" and _says(m) for m in messages[first:]):
        raise Refusal("every assistant message is empty")
    conversation = Conversation(
        [{k: v for k, v in m.items() if k not in OF_MESSAGES} for m in messages],
        first,
        factors,
        [read_critical(message, message["content"] or "") for message in messages],
        tools or None,
        variables,
        weight,
    )
    if not conversation.learnt:
        raise Refusal("no assistant message is to be learnt: `loss`, `train` or `weight` is off")
    return conversation


def _tools(row: dict[str, Any]) -> list[Any] | None:
    """`tools` of a row, or `functions`, OpenAI's earlier name and form of them."""
    tools = None
    for key in ("tools", "functions"):
        if row.get(key) is not None:
            found = [without_nulls(parsed(tool, key, dict)) for tool in parsed(row[key], key, list)]
            if tools and found:
                raise Refusal("the row has `tools` and `functions`: leave one out")
            tools = found or tools
    if tools and "functions" in row:
        return [t if "function" in t else {"type": "function", "function": t} for t in tools]
    return tools


def _with_system(messages: list[Message], row: dict[str, Any]) -> list[Message]:
    """The messages behind the row's `system`, where it has one."""
    system = row.get("system")
    if not isinstance(system, str) or not system.strip():
        return messages
    if messages and messages[0]["role"] == "system":
        if messages[0]["content"].strip() == system.strip():
            return messages
        raise Refusal("the row has `system` and a system message: leave one out")
    return [{"role": "system", "content": system}, *messages]


def check_variables(variables: dict[str, Any]) -> None:
    """Raises Refusal: a variable of the template that is not the user's to set."""
    for name in ("messages", "tools", "add_generation_prompt"):
        if name in variables:
            raise Refusal(f"`chat_template_kwargs` has '{name}', which the row or we decide")


def _says(message: Message) -> bool:
    """Whether an assistant message has anything to learn; an empty one is context."""
    thought = any(str(message.get(key) or "").strip() for key in THOUGHTS)
    return bool((message["content"] or "").strip() or message.get("tool_calls") or thought)


def _factor(message: Message) -> float:
    """What a message's tokens weigh, from `loss`, `train` and `weight`."""
    factor = read_weight(message)
    factor = 1.0 if factor is None else factor
    for key in ("loss", "train"):
        value = message.get(key)
        if value is None:
            continue
        if type(value) not in (bool, int) or value not in (0, 1):
            raise Refusal(f"`{key}` of a message is not true or false")
        factor *= bool(value)
    return factor if message["role"] != "assistant" or _says(message) else 0.0


def _check_known(holder: dict[str, Any], known: tuple[str, ...], where: str) -> None:
    """Refuse keys that look like a weight or a mask and would be ignored."""
    for key in holder:
        if key not in known and LOSS_LIKE.search(key):
            hint = did_you_mean(key, [*known, "loss", "train"])
            raise Refusal(f"`{key}` of {where} is not known{hint}: {', '.join(known)} are")
