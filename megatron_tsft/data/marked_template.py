"""A chat template that says where each message's output begins and ends, without a change to its
text.

The template is parsed with transformers' own Jinja environment. In every loop over the messages the
body is put between two marks, a third stands behind the loop, and the inside of a {% generation %}
block is marked, too; a mark is a short text that no template writes, and is cut out of the rendered
text again. Marks that stand where
their text is handed straight to the output cannot change what the template writes around them;
where a loop stands inside a macro, a block that is assigned to a variable or a filter, the text is
compared with that of the template itself (`Rendered.text` is then asserted to be equal).
"""

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Message = dict[str, Any]

# the start of a mark's text, new in every process: no input can have it
_MARK = f"\ue000{secrets.token_hex(8)}:"
_END = "\ue001"


@dataclass(frozen=True)
class Span:
    """Characters [start, stop) of a text."""

    start: int
    stop: int

    def __bool__(self) -> bool:
        return self.start < self.stop


@dataclass(frozen=True)
class Rendered:
    """What a template wrote.

    Attributes:
        text: as transformers renders it.
        messages: what the loops' bodies wrote for each message, by its place in the conversation;
            empty spans are left out, and a message has several where several loops write it.
        generated: the insides of {% generation %} blocks in order, each with its message's place,
            None outside a loop.
    """

    text: str
    messages: dict[int, list[Span]]
    generated: list[tuple[int | None, Span]]


class MarkedTemplate:
    """One chat template, compiled with marks."""

    def __init__(self, source: str, now: Callable[[str], str] | None = None) -> None:
        """Args:
            source: Jinja text.
            now: what the template's strftime_now gives; the clock without it.

        Raises:
            jinja2.TemplateSyntaxError: the source is no valid Jinja.
        """
        from transformers.utils.chat_template_utils import (
            _compile_jinja_template,  # pyright: ignore[reportPrivateUsage]
        )

        self.plain = _compile_jinja_template(source)
        environment = self.plain.environment
        tree = environment.parse(source)
        marking = _mark(tree)
        self._exact = marking.exact  # marks cannot change the text
        self.has_generation = marking.generation
        self.prompt_is_constant = _prompt_is_constant(tree)
        self.marked = environment.from_string(tree)
        self._now = {} if now is None else {"strftime_now": now}

    def render(self, messages: Sequence[Message], **variables: Any) -> str:
        """The text alone."""
        return self.plain.render(messages=list(messages), **self._now, **variables)

    def locate(self, messages: Sequence[Message], **variables: Any) -> Rendered:
        """The text, and where in it each message was written.

        Raises:
            jinja2.TemplateError and what else a template may raise.
            LookupError: the marks change the text, which the template takes apart again.
        """
        messages = list(messages)
        places = {id(message): place for place, message in enumerate(messages)}

        def mark(kind: str, item: Any = None, *lists: Any) -> str:
            if type(item) is int:  # a loop over places in a list
                among = next((found for found in lists if isinstance(found, list)), [])
                item = among[item] if 0 <= item < len(among) else None
            place = places.get(id(item), "") if isinstance(item, dict) else ""
            return f"{_MARK}{kind},{place}{_END}"

        text = self.marked.render(messages=messages, _mark=mark, **self._now, **variables)
        rendered = _unmarked(text)
        if not self._exact and rendered.text != self.render(messages, **variables):
            raise LookupError("the template takes its loop's output apart")
        return rendered


def _unmarked(text: str) -> Rendered:
    """Cut the marks out of a text and read them."""
    first, *parts = text.split(_MARK)
    pieces, length = [first], len(first)
    messages: dict[int, list[Span]] = {}
    generated: list[tuple[int | None, Span]] = []
    loops: dict[str, tuple[int | None, int]] = {}  # open: loop -> message, start
    block: tuple[int | None, int] | None = None

    def close(loop: str) -> None:
        place, start = loops.pop(loop, (None, 0))
        if place is not None and start < length:
            messages.setdefault(place, []).append(Span(start, length))

    for part in parts:
        mark, _, rest = part.partition(_END)
        kind, place = mark.split(",")
        if kind == "generation":
            inside = [message for message, _ in loops.values()]
            block = (inside[-1] if inside else None, length)
        elif kind == "endgeneration":
            assert block is not None
            if block[1] < length:
                generated.append((block[0], Span(block[1], length)))
        else:
            loop = kind.removeprefix("end")
            close(loop)  # a `continue` or a `break` has left it open
            if kind == loop:
                loops[loop] = (int(place) if place else None, length)
        pieces.append(rest)
        length += len(rest)
    return Rendered("".join(pieces), messages, generated)


@dataclass
class _Marking:
    exact: bool
    generation: bool


def _mark(tree: Any) -> _Marking:
    """Put marks into a parsed template, in place."""
    from jinja2 import nodes

    names = _names_of_messages(tree)
    marking = _Marking(exact=True, generation=False)
    inner = (nodes.Macro, nodes.CallBlock, nodes.AssignBlock, nodes.FilterBlock)
    count = 0
    behind: dict[int, str] = {}  # loop node -> its end

    def output(kind: str, *words: Any) -> Any:
        words = (nodes.Const(kind), *words)
        call = nodes.Call(nodes.Name("_mark", "load"), list(words), [], None, None)
        return nodes.Output([call])

    def visit(node: Any, plain: bool) -> None:
        nonlocal count
        generation = _is_generation(node)
        inside = plain and not (isinstance(node, inner) and not generation)
        for child in list(node.iter_child_nodes()):
            visit(child, inside)
        for field, children in list(node.iter_fields()):
            if isinstance(children, list):
                setattr(node, field, [part for child in children for part in ended(child)])
        if generation:
            marking.generation = True
            marking.exact &= plain
            node.body = [output("generation"), *node.body, output("endgeneration")]
        if isinstance(node, nodes.For) and names & _loaded(node.iter):
            item = node.target
            if isinstance(item, nodes.Tuple):  # enumerate-like pairs
                item = item.items[-1]
            if isinstance(item, nodes.Name):
                loop = f"loop{count}"
                count += 1
                # part of the messages, where the loop counts through one, before all of them
                lists = sorted(names & _loaded(node.iter), key=lambda name: name == "messages")
                begin = output(loop, *(nodes.Name(name, "load") for name in (item.name, *lists)))
                node.body = [begin, *node.body, output(f"end{loop}")]
                behind[id(node)] = f"end{loop}"
                marking.exact &= plain

    def ended(node: Any) -> list[Any]:
        """A node, and behind a loop over the messages its last mark, which a `break` passes."""
        return [node, output(behind[id(node)])] if id(node) in behind else [node]

    visit(tree, True)
    tree.set_environment(tree.environment)
    for node in tree.find_all(nodes.Node):
        if getattr(node, "lineno", None) is None:
            node.lineno = 1
    return marking


def _is_generation(node: Any) -> bool:
    from jinja2 import nodes

    if not isinstance(node, nodes.CallBlock):
        return False
    return any(
        attribute.name == "_generation_support"
        for attribute in node.call.find_all(nodes.ExtensionAttribute)
    )


def _loaded(node: Any) -> set[str]:
    """The names that an expression reads."""
    from jinja2 import nodes

    found = {name.name for name in node.find_all(nodes.Name) if name.ctx == "load"}
    return found | ({node.name} if isinstance(node, nodes.Name) else set())


def _names_of_messages(tree: Any) -> set[str]:
    """`messages`, and what is assigned from it."""
    from jinja2 import nodes

    names, before = {"messages"}, 0
    while len(names) > before:
        before = len(names)
        for assign in tree.find_all(nodes.Assign):
            target = assign.target
            whole = isinstance(target, nodes.Name) and names & _loaded(assign.node)
            if whole and not isinstance(assign.node, nodes.Compare | nodes.Const):
                names.add(target.name)
    return names


def _prompt_is_constant(tree: Any) -> bool:
    """Whether what add_generation_prompt adds depends on nothing that the template computes from
    the conversation."""
    from jinja2 import nodes

    stored = {name.name for name in tree.find_all(nodes.Name) if name.ctx != "load"}
    stored |= {ref.name for ref in tree.find_all(nodes.NSRef)}
    changing = stored | {"messages", "loop"}

    def constant(node: Any, around: frozenset[str]) -> bool:
        if isinstance(node, nodes.If | nodes.CondExpr) and "add_generation_prompt" in _loaded(
            node.test
        ):
            read = around | set(_loaded(node))
            return not (read - {"add_generation_prompt"}) & changing
        if isinstance(node, nodes.If | nodes.CondExpr):
            around = around | _loaded(node.test)
        if isinstance(node, nodes.For):
            around = around | {"loop"}
        return all(constant(child, around) for child in node.iter_child_nodes())

    return constant(tree, frozenset())
