"""What a chat template leaves out of a conversation.

Each content, thought, tool call and `tools` that is given must leave its mark on the text: a long
text is looked for where its message was written, and so is a short one within what the template
was seen to write around such messages (`Frames`); all else is tried by rendering once more without
it, and where that changes nothing, outer white space apart, the template drops it. Only two drops
have another end than a refusal: thoughts of earlier turns, which templates leave out by design, and
the thought in the content of the last turn, which the model does generate.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_tsft.data.marked_template import Message, Rendered
from megatron_tsft.data.rows import Conversation
from megatron_tsft.data.turns import CLOSE, OPEN, PROBE, THOUGHTS, Refusal

# a text of so many characters does not stand in its message's output by chance
LONG = 16
# (messages, tools) -> what the template writes
Render = Callable[[list[Message], list[Any] | None], Rendered]


class Frames:
    """What a template writes before and behind the text of a message, as it was seen to. Between
    them stands the text, so a message of that form that has nothing else was written with it,
    however short."""

    MOST = 16  # of a role: frames that hold more than a form are of no use

    def __init__(self) -> None:
        self._seen: dict[str, set[tuple[str, str]]] = {}

    def has(self, role: str, written: str, text: str) -> bool:
        """Whether a message was written as a frame with `text` in it."""
        return any(
            len(written) == len(before) + len(text) + len(behind)
            and written.startswith(before)
            and written.endswith(behind)
            and written.startswith(text, len(before))
            for before, behind in self._seen.get(role, ())
        )

    def learn(self, role: str, written: str, text: str) -> None:
        """The frame of a message whose text the template reads."""
        frames = self._seen.setdefault(role, set())
        if len(frames) < self.MOST and written.count(text) == 1:
            before, _, behind = written.partition(text)
            frames.add((before, behind))


@dataclass(frozen=True)
class Thought:
    """A thought that the template leaves out.

    message: whose. key: where it stands; "content" before </think>.
    """

    message: int
    key: str


def dropped_thoughts(
    conversation: Conversation,
    rendered: Rendered,
    render: Render,
    frames: Frames,
    places: Sequence[int] | None = None,
) -> list[Thought]:
    """The thoughts that the template leaves out; of the messages at `places`, or of all. `frames`
    are the template's.

    Raises:
        Refusal: it leaves out anything else.
    """
    messages, tools = conversation.messages, conversation.tools

    def unread(changed: list[Message], tools: list[Any] | None) -> bool:
        """Whether the text is the same with these.

        Raises:
            Refusal: the template refuses them.
        """
        return render(changed, tools).text.strip() == rendered.text.strip()

    def with_key(i: int, key: str, value: Any) -> list[Message]:
        """The messages with another `key` of message i; None takes it away."""
        message = {name: entry for name, entry in messages[i].items() if name != key}
        if value is not None:
            message[key] = value
        return [*messages[:i], message, *messages[i + 1 :]]

    def unread_key(i: int, key: str, value: Any, other: Any) -> bool:
        """Whether `key` of message i makes no difference. A template may need it, so where it
        refuses `value`, it is asked with `other`."""
        for tried in (value, other):
            try:
                return unread(with_key(i, key, tried), tools)
            except Refusal:
                continue
        return False

    def dropped(i: int, text: str, key: str, value: Any) -> bool:
        """Whether message i's `text` is left out; it is gone where `key` is `value`."""
        text = text.strip()
        if not text:
            return False
        role, found = messages[i]["role"], written(i)
        # a message that has nothing but this text
        alone = len(messages[i]) == 2 and text == (messages[i].get("content") or "").strip()
        if (len(text) >= LONG and text in found) or (alone and frames.has(role, found, text)):
            return False
        if unread_key(i, key, value, PROBE):
            return True
        if alone and i in rendered.messages:
            frames.learn(role, found, text)
        return False

    def written(i: int) -> str:
        spans = rendered.messages.get(i, [])
        found = "".join(rendered.text[span.start : span.stop] for span in spans)
        return found or rendered.text  # a system message may stand before the loop

    def no_tools() -> bool:
        try:
            return unread(messages, None)
        except Refusal:
            return False  # the template misses them

    if tools and places is None and no_tools():
        raise Refusal("the row has `tools`, which the chat template does not use")
    lost: list[Thought] = []
    for i in range(len(messages)) if places is None else places:
        message = messages[i]
        content = message.get("content") or ""
        thought, answer = (
            split_thought(content) if message["role"] == "assistant" else ("", content)
        )
        if thought and thought not in written(i):
            lost.append(Thought(i, "content"))
        elif thought:
            answer = content
        if dropped(i, answer, "content", content[: len(content) - len(answer)]):
            role = message["role"]
            raise Refusal(
                f"the chat template drops the content of a message of role '{role}': "
                + (
                    SYSTEM
                    if role == "system"
                    else "give a template that writes it (--chat-template)"
                )
            )
        lost += [
            Thought(i, key)
            for key in THOUGHTS
            if isinstance(message.get(key), str) and dropped(i, message[key], key, None)
        ]
        for key in SAID:
            if message.get(key) and unread_key(i, key, None, PROBE):
                raise Refusal(
                    f"the chat template drops `{key}` of a message: write it into the content, or"
                    " leave it out"
                )
        calls = message.get("tool_calls") or []
        for place, call in enumerate(calls):
            for part, tried in _lesser(call, written(i)):
                rest = [*calls[:place], *([tried] if tried else []), *calls[place + 1 :]]
                if unread_key(i, "tool_calls", rest or None, None):
                    raise Refusal(
                        f"the chat template drops {part}"
                        + ("" if tools else " of a row without `tools`")
                        + ": give `tools`, or a template that writes them (--chat-template)"
                    )
    return lost


# what beside content, thought and calls a message may say
SAID = ("refusal", "thought", "thoughts", "reasoning_details", "audio")


def _lesser(call: Any, written: str) -> list[tuple[str, Any]]:
    """(what is missing, the call without it) of a tool call and its parts, which a template must
    not write alike; without parts that stand in the text, as JSON or as they are."""
    holder = call.get("function", call) if isinstance(call, dict) else None
    lesser: list[tuple[str, Any]] = [("`tool_calls`", None)]
    if not isinstance(holder, dict):
        return lesser

    def changed(key: str, value: Any) -> Any:
        inner = {**holder, key: value}
        return inner if holder is call else {**call, "function": inner}

    name, arguments = holder.get("name"), holder.get("arguments")
    if isinstance(name, str) and name and name not in written:
        lesser.append(("the name of a tool call", changed("name", PROBE)))
    if arguments and not _stands(arguments, written):
        other = {PROBE: PROBE} if isinstance(arguments, dict) else json.dumps({PROBE: PROBE})
        lesser.append(("the arguments of a tool call", changed("arguments", other)))
    return lesser


def _stands(arguments: Any, written: str) -> bool:
    """Whether arguments stand in a text as JSON, or all their keys and plain values do."""
    if isinstance(arguments, str):
        return arguments in written
    if json.dumps(arguments, ensure_ascii=False) in written or json.dumps(arguments) in written:
        return True
    return all(
        key in written and (isinstance(value, bool | dict | list) or str(value) in written)
        for key, value in arguments.items()
    )


SYSTEM = (
    "write it into the first user's message, or give the row as `prompt` and `completion`, whose"
    " prompt is rendered as served"
)


def split_thought(content: str) -> tuple[str, str]:
    """(thought without its marks and outer white space, what follows it); ("", content) without
    </think>."""
    if CLOSE not in content:
        return "", content
    before, _, answer = content.rpartition(CLOSE)
    return before.replace(OPEN, "").strip(), answer


def protect(content: str) -> str:
    """A content of the same length in which a template does not see </think>; `restore` undoes
    it."""
    return content.replace(CLOSE, _HIDDEN)


def restore(text: str) -> str:
    """The text as it was before `protect`."""
    return text.replace(_HIDDEN, CLOSE)


_HIDDEN = "\ue0f7" * len(CLOSE)
