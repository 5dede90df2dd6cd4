"""The keys of a row of the input, checked: what is wrong is refused by name."""

from typing import Any

import numpy as np

from megatron_tsft.data.turns import Message, Refusal

Spans = list[tuple[int, int]]


def read_messages(value: Any) -> list[Message]:
    """The messages without null keys.

    Raises:
        Refusal: not a list of objects with a role and a content that is a string.
    """
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise Refusal("the messages are not a list of objects")
    messages = [
        {key: entry for key, entry in message.items() if entry is not None} for message in value
    ]
    for message in messages:
        if not isinstance(message.get("role"), str):
            raise Refusal("a message has no `role`")
        if "content" not in message and message.get("tool_calls"):
            message["content"] = ""  # null beside tool calls, as OpenAI's format writes it
        if not isinstance(message.get("content"), str):
            raise Refusal("a message's `content` is not a string")
        if message["role"] == "assistant":
            if not message["content"].strip() and not message.get("tool_calls"):
                raise Refusal("an assistant message is empty")
        elif "critical" in message:
            raise Refusal("`critical` stands in a message that is not the assistant's")
        if "weight" in message:
            raise Refusal("`weight` stands in a message: it belongs to the row")
    return messages


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


def read_weight(row: dict[str, Any]) -> float | None:
    """`weight` of a row; None without it."""
    value = row.get("weight")
    if value is None:
        return None
    if type(value) not in (int, float) or not 0 <= value <= float(np.finfo(np.float32).max):
        raise Refusal("`weight` is not a number >= 0")
    return float(value)
