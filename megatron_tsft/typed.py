"""What JSON says as the type that an annotation promises: every card and configuration is read by
one rule."""

import contextlib
import dataclasses
import math
import types
import typing
from typing import Annotated, Any

LARGEST = 2**63 - 1  # what Arrow and torch count with
Count = Annotated[int, 1, LARGEST]  # as sizes of a model are
Parts = Annotated[int, 1, 100_000]  # of what a model has that are listed one by one, as layers
Positive = Annotated[float, "above 0"]
Dtype = Annotated[str, ("float32", "float16", "bfloat16")]  # of weights

WORDS: dict[Any, str] = {
    Count: "a whole number from 1 on",
    Parts: f"a whole number from 1 to {typing.get_args(Parts)[2]}",
    Positive: "a number above 0",
    Dtype: "float32, float16 or bfloat16",
    int: "a whole number from 0 on",
    float: "a number",
    str: "text",
    bool: "true or false",
    type(None): "null",
}


class Misfit(ValueError):
    """A value that is not of the promised type; `wanted` says what that is."""

    def __init__(self, name: str, value: Any, wanted: str) -> None:
        super().__init__(f"{name}={shown(value)}: it must be {wanted}")


def shown(value: Any) -> str:
    """A value for a message: not more of it than a line has room for."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def typed(value: Any, kind: Any, name: str) -> Any:
    """A value as an annotation has it: dataclasses and tuples are made of objects and lists.

    Whole numbers are not negative and fit into 64 bits; true is no number, and 5.0 no whole one.

    Args:
        value: from JSON.
        kind: int, float, str, bool, None, Any, one of the names above, list[...], dict[str, ...],
            tuple[...], a union, a TypedDict or a dataclass.
        name: for messages.

    Raises:
        Misfit: it is something else, somewhere.
    """
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin is typing.NotRequired:
        return typed(value, inner[0], name)
    if origin in (types.UnionType, typing.Union):
        return _one_of(value, inner, name)
    if origin is list and isinstance(value, list):
        return [typed(item, inner[0], f"{name}[{i}]") for i, item in enumerate(value)]
    if origin is tuple and isinstance(value, list) and len(value) == len(inner):
        return tuple(
            typed(item, part, f"{name}[{i}]")
            for i, (item, part) in enumerate(zip(value, inner, strict=True))
        )
    if origin is dict and isinstance(value, dict):
        return {key: typed(item, inner[1], f"{name}.{key}") for key, item in value.items()}
    if isinstance(value, dict) and (typing.is_typeddict(kind) or dataclasses.is_dataclass(kind)):
        return _members(value, kind, name)
    if kind in WORDS and _is_a(value, kind):
        return value
    raise Misfit(name, value, words(kind))


def words(kind: Any) -> str:
    """A type for people."""
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        return " or ".join(words(part) for part in typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        return f"a list of {len(typing.get_args(kind))}"
    return WORDS.get(kind) or ("a list" if typing.get_origin(kind) is list else "an object")


def _one_of(value: Any, kinds: tuple[Any, ...], name: str) -> Any:
    for kind in kinds:
        with contextlib.suppress(Misfit):
            return typed(value, kind, name)
    raise Misfit(name, value, " or ".join(words(kind) for kind in kinds))


def _is_a(value: Any, kind: Any) -> bool:
    """Whether a plain value is of a plain type."""
    if kind is bool or kind is str or kind is type(None):
        return isinstance(value, kind)
    if kind == Dtype:
        return isinstance(value, str) and value in typing.get_args(kind)[1]
    if kind is int or kind in (Count, Parts):
        low, high = (0, LARGEST) if kind is int else typing.get_args(kind)[1:]
        return type(value) is int and low <= value <= high
    # a float of 64 bits holds it, too
    number = type(value) in (int, float) and abs(value) <= LARGEST and not math.isnan(value)
    return number and (kind is float or value > 0)


def _members(value: dict[str, Any], kind: Any, name: str) -> Any:
    """A TypedDict's or a dataclass' values, of which none is missing or unknown."""
    prefix = f"{name}." if name else ""
    make, hints = kind, typing.get_type_hints(kind, include_extras=True)
    if typing.is_typeddict(kind):
        make, needed = dict, kind.__required_keys__
    else:
        fields = dataclasses.fields(kind)
        needed = {f.name for f in fields if f.default is f.default_factory is dataclasses.MISSING}
    for key in sorted(needed - value.keys()):
        raise Misfit(f"{prefix}{key}", None, f"there, {words(hints[key])}")
    for key in sorted(value.keys() - hints.keys()):
        raise Misfit(f"{prefix}{key}", value[key], "left out, nothing of that name is known")
    return make(**{key: typed(item, hints[key], prefix + key) for key, item in value.items()})
