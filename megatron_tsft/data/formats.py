"""The formats that users' rows have, each made into `messages`, `prompt` and `completion`, or
`text`.

A format is a row of FORMATS: how its rows are known by their keys, and a function of one row. What
it does not know of a row is handed on, so that weights, tools and template variables work in every
format.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_tsft.data.rows import parsed
from megatron_tsft.data.turns import Refusal
from megatron_tsft.errors import UserError
from megatron_tsft.names import did_you_mean

Row = dict[str, Any]
SEEN_ROWS = 64  # that a format is told from
# ShareGPT's names of who speaks -> roles
SPEAKERS = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "bot", "model", "chatgpt"), "assistant"),
    "system": "system",
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
}


@dataclass(frozen=True)
class Format:
    """needs: keys that a row of it has. make: the row as the encoder reads it."""

    needs: tuple[str, ...]
    make: Callable[[Row], Row]


def _same(row: Row) -> Row:
    return row


def _alpaca(row: Row) -> Row:
    """instruction, input (may be empty), output; system and history, as LLaMA-Factory has them."""
    rest = dict(row)
    instruction, output = rest.pop("instruction"), rest.pop("output")
    asked = {"instruction": instruction, "input": rest.pop("input", None)}
    for key, part in asked.items():
        if part is not None and not isinstance(part, str):
            raise Refusal(f"`{key}` is not text")
    question = "\n\n".join(part for part in asked.values() if part)
    history = rest.pop("history", None) or []
    if not isinstance(history, list):
        raise Refusal("`history` is not a list of [question, answer]")
    messages = []
    if system := rest.pop("system", None):
        messages.append({"role": "system", "content": system})
    for pair in history:
        if not isinstance(pair, list) or len(pair) != 2:
            raise Refusal("`history` is not a list of [question, answer]")
        messages.append({"role": "user", "content": pair[0]})
        messages.append({"role": "assistant", "content": pair[1], "loss": False})
    messages.append({"role": "user", "content": question})
    messages.append({"role": "assistant", "content": output})
    return {**rest, "messages": messages}


def _sharegpt(row: Row) -> Row:
    """conversations of {from, value}; system and tools beside them."""
    rest = dict(row)
    turns = rest.pop("conversations")
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise Refusal("`conversations` is not a list of objects")
    messages = []
    if system := rest.pop("system", None):
        messages.append({"role": "system", "content": system})
    for turn in turns:
        turn = dict(turn)
        if "role" not in turn:
            speaker, value = turn.pop("from", None), turn.pop("value", None)
            if speaker == "function_call":
                turn |= {"role": "assistant", "content": "", "tool_calls": _calls(value)}
            elif isinstance(speaker, str) and speaker in SPEAKERS:
                turn |= {"role": SPEAKERS[speaker], "content": value}
            else:
                raise Refusal(f"`from` is '{speaker}', none of {', '.join(SPEAKERS)}")
        messages.append(turn)
    return {**rest, "messages": messages}


def _calls(value: Any) -> list[Row]:
    """JSON text of one call or of several -> tool_calls."""
    calls = parsed(value, "function_call", object)
    return [
        {"type": "function", "function": call}
        for call in (calls if isinstance(calls, list) else [calls])
    ]


def _preference(row: Row) -> Row:
    """The chosen side of a pair: text or messages, with or without the prompt in them."""
    rest = {key: value for key, value in row.items() if key != "rejected"}
    chosen = rest.pop("chosen")
    if "prompt" in rest:
        if isinstance(chosen, list) and isinstance(rest["prompt"], str):
            if chosen[:-1]:  # the conversation is whole
                rest.pop("prompt")
                return {**rest, "messages": chosen}
            rest["prompt"] = [{"role": "user", "content": rest["prompt"]}]
        return {**rest, "completion": chosen}
    return {**rest, ("messages" if isinstance(chosen, list) else "text"): chosen}


FORMATS = {
    "messages": Format(("messages",), _same),
    "prompt-completion": Format(("prompt", "completion"), _same),
    "sharegpt": Format(("conversations",), _sharegpt),
    "alpaca": Format(("instruction", "output"), _alpaca),
    "text": Format(("text",), _same),
    # never detected: which side of a pair is learnt is the user's word
    "preference": Format(("chosen",), _preference),
}


def detect(rows: Iterable[Row], columns: Mapping[str, str], where: str) -> str:
    """The format whose keys the most of the first rows have; the first of several.

    Args:
        columns: see `rename`.
        where: the input, for errors.

    Raises:
        UserError: none is told.
    """
    seen = [rename(row, columns) for row, _ in zip(rows, range(SEEN_ROWS), strict=False)]
    if not seen:
        return "messages"  # what is wrong with the input is said elsewhere
    has: dict[str, int] = {}
    for name, kind in FORMATS.items():
        if name != "preference":
            has[name] = sum(fits(row, kind) for row in seen)
    best = max(has, key=lambda name: has[name])
    if has[best]:
        return best
    keys = list(dict.fromkeys(key for row in seen for key in row))
    if "chosen" in keys:
        raise UserError(
            f"{where} has pairs of `chosen` and `rejected`: --format preference learns the chosen"
            " side"
        )
    wanted = dict.fromkeys(key for kind in FORMATS.values() for key in kind.needs)
    hints = [f"--columns {key}=..." for key in wanted if did_you_mean(key, keys)]
    raise UserError(
        f"{where} has rows of {', '.join(keys) or 'nothing'}, which is none of the formats"
        f" {', '.join(FORMATS)}: name its columns ("
        + (" ".join(hints) or "--columns messages=dialog")
        + ") or its format (--format)"
    )


def fits(row: Row, kind: Format) -> bool:
    """Whether a row has the keys of a format."""
    return all(row.get(key) is not None for key in kind.needs)


def made(row: Row, name: str, columns: Mapping[str, str]) -> Row:
    """A row as the encoder reads it. Rows of a file may have several formats: what does not fit is
    left as it is.

    Raises:
        Refusal: the row is not what its keys say.
    """
    row = rename(row, columns)
    return FORMATS[name].make(row) if fits(row, FORMATS[name]) else row


def rename(row: Row, columns: Mapping[str, str]) -> Row:
    """A row whose columns have our names; `columns` maps ours to the file's."""
    if not columns:
        return row
    names = {theirs: ours for ours, theirs in columns.items()}
    return {names.get(key, key): value for key, value in row.items() if key not in columns}


def parse_columns(words: Iterable[str]) -> dict[str, str]:
    """--columns ours=theirs ... -> {ours: theirs}.

    Raises:
        UserError: a word has another form.
    """
    columns = {}
    for word in words:
        ours, equal, theirs = word.partition("=")
        if not (ours and equal and theirs):
            raise UserError(f"--columns {word}: write ours=theirs, as messages=dialog")
        columns[ours] = theirs
    return columns
