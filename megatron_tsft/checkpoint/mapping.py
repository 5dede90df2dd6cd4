"""The mapping table: a family is data (which Hugging Face tensors lie where in which Megatron
tensor), never code.

A Megatron `torch_dist` checkpoint stacks layers: `decoder.layers.mlp.linear_fc2.weight` is
[num_layers, hidden, ffn]. One `TableRow` is one such key with the Hugging Face tensors of ONE
layer, whose placeholders ({layer}, {expert}) become the leading dimensions in the order of their
appearance. Below them every kind of row is a permutation of rows (dimension 0), so a layout is a
list of `Segment`s that import and export read in opposite directions.
"""

import itertools
import string
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from megatron_tsft.errors import UserError

RowKind = Literal["plain", "vocab", "qkv", "gate_up"]
Shape = tuple[int, ...]
Index = tuple[int, ...]

# placeholder -> the Megatron argument that counts it
LEADING = {"layer": "num_layers", "expert": "num_experts"}


@dataclass(frozen=True)
class TensorPattern:
    """One Hugging Face tensor of a row: its name, with placeholders, and names of its `sizes`."""

    name: str
    dims: tuple[str, ...]


@dataclass(frozen=True)
class TableRow:
    """One Megatron key and the Hugging Face tensors that fill it.

    Attributes:
        kind: plain (one tensor as it is), vocab (one tensor, rows padded with zeros), qkv (query,
            key, value: per KV group its query heads, its key head, its value head), gate_up (gate
            above up).
        when: the Megatron argument that must be true for the key to exist; None means always.
    """

    megatron: str
    kind: RowKind
    sources: tuple[TensorPattern, ...]
    when: str | None = None

    def indices(self, arguments: Mapping[str, Any]) -> Iterator[Index]:
        """Every value of the leading dimensions, in order; one empty index where there are none."""
        return itertools.product(*(range(count) for count in self.leading(arguments)))

    def leading(self, arguments: Mapping[str, Any]) -> Shape:
        """The leading dimensions of the Megatron tensor, e.g. (num_layers,)."""
        return tuple(arguments[LEADING[name]] for name in self._placeholders())

    def names(self, index: Index) -> tuple[str, ...]:
        """The Hugging Face names at one index of the leading dimensions."""
        values = dict(zip(self._placeholders(), index, strict=True))
        return tuple(source.name.format(**values) for source in self.sources)

    def shapes(self, sizes: Mapping[str, int]) -> tuple[Shape, ...]:
        """The shapes of the Hugging Face tensors, in the order of `sources`."""
        return tuple(tuple(sizes[dim] for dim in source.dims) for source in self.sources)

    def _placeholders(self) -> list[str]:
        return [field for _, field, _, _ in string.Formatter().parse(self.sources[0].name) if field]


@dataclass(frozen=True)
class Segment:
    """`length` consecutive rows of Hugging Face tensor number `source` (None: zeros), from row
    `start`, which lie at the Megatron tensor's rows from `target`."""

    source: int | None
    start: int
    target: int
    length: int


@dataclass(frozen=True)
class Family:
    """Everything that the converter knows about one family of models.

    Attributes:
        architectures: the names of `config.architectures` that it serves.
        models: which those are, for the docs.
        arguments: Hugging Face config -> Megatron arguments by argparse destination; raises
            UserError for what Megatron cannot express.
        rows: the table.
        extra_states: Megatron modules whose `_extra_state` object a model asks for, each with its
            leading placeholders.
    """

    name: str
    architectures: tuple[str, ...]
    models: str
    arguments: Callable[[Any], dict[str, Any]]
    rows: tuple[TableRow, ...]
    extra_states: tuple[tuple[str, tuple[str, ...]], ...]

    def active_rows(self, arguments: Mapping[str, Any]) -> list[TableRow]:
        """The rows whose key exists in a model with these arguments."""
        return [row for row in self.rows if row.when is None or arguments[row.when]]


def sizes(arguments: Mapping[str, Any], vocab_size: int) -> dict[str, int]:
    """Dimension name -> size: every integer Megatron argument by its name, and derived ones."""
    named = {name: value for name, value in arguments.items() if type(value) is int}
    heads, groups, channels = (
        arguments[n] for n in ("num_attention_heads", "num_query_groups", "kv_channels")
    )
    return named | {
        "vocab_size": vocab_size,
        "query_size": heads * channels,
        "key_value_size": groups * channels,
    }


def padded_vocab_size(vocab_size: int, divisible_by: int) -> int:
    """`vocab_size` rounded up to a multiple of `divisible_by`."""
    return -(-vocab_size // divisible_by) * divisible_by


def segments(
    row: TableRow, shapes: tuple[Shape, ...], arguments: Mapping[str, Any], padded_vocab: int
) -> list[Segment]:
    """Where the rows of one layer's Hugging Face tensors lie in Megatron's, in Megatron's order."""
    counts = [shape[0] for shape in shapes]
    if row.kind == "plain":
        blocks: list[tuple[int | None, int, int]] = [(0, 0, counts[0])]
    elif row.kind == "vocab":
        blocks = [(0, 0, counts[0]), (None, 0, padded_vocab - counts[0])]
    elif row.kind == "gate_up":
        blocks = [(0, 0, counts[0]), (1, 0, counts[1])]
    else:
        groups = arguments["num_query_groups"]
        per_group = [count // groups for count in counts]  # rows of one group's queries, key, value
        blocks = [
            (part, group * per_group[part], per_group[part])
            for group in range(groups)
            for part in range(3)
        ]
    result, target = [], 0
    for source, start, length in blocks:
        if length:
            result.append(Segment(source, start, target, length))
        target += length
    return result


def megatron_shape(
    row: TableRow, arguments: Mapping[str, Any], vocab_size: int, padded_vocab: int
) -> Shape:
    """The global shape of a row's Megatron tensor, e.g. [num_layers, rows, columns]."""
    shapes = row.shapes(sizes(arguments, vocab_size))
    last = segments(row, shapes, arguments, padded_vocab)[-1]
    return (*row.leading(arguments), last.target + last.length, *shapes[0][1:])


def model_shapes(
    family: Family, arguments: Mapping[str, Any], vocab_size: int, padded_vocab: int
) -> dict[str, Shape]:
    """Megatron key -> global shape of every weight of the model."""
    return {
        row.megatron: megatron_shape(row, arguments, vocab_size, padded_vocab)
        for row in family.active_rows(arguments)
    }


def extra_state_keys(family: Family, arguments: Mapping[str, Any]) -> list[str]:
    """The keys of the `_extra_state` objects, named as Megatron does:
    `<module>._extra_state/shard_<at>_<of>`."""
    keys = []
    for module, placeholders in family.extra_states:
        counts = [arguments[LEADING[name]] for name in placeholders] or [1]
        of = ".".join(map(str, counts))
        for at in itertools.product(*map(range, counts)):
            keys.append(f"{module}._extra_state/shard_{'.'.join(map(str, at))}_{of}")
    return keys


def check_table(family: Family) -> None:
    """Refuse a table that contradicts itself.

    Raises:
        UserError: a key twice, a wrong number of tensors for a kind, or tensors of a row with
            different placeholders.
    """
    tensors_of = {"plain": 1, "vocab": 1, "qkv": 3, "gate_up": 2}
    seen: set[str] = set()
    for row in family.rows:
        placeholders = {
            tuple(field for _, field, _, _ in string.Formatter().parse(source.name) if field)
            for source in row.sources
        }
        unknown = {name for names in placeholders for name in names} - set(LEADING)
        if (
            row.megatron in seen
            or len(row.sources) != tensors_of[row.kind]
            or len(placeholders) != 1
            or unknown
        ):
            raise UserError(
                f"family {family.name}: the table's row {row.megatron} is wrong for its kind,"
                f" {row.kind}: correct it"
            )
        seen.add(row.megatron)
