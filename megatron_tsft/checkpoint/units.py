"""The steps of a conversion: a table's row at one layer, as boxes or as Hugging Face tensors."""

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch

from megatron_tsft.checkpoint.card import ModelCard
from megatron_tsft.checkpoint.families import get_family
from megatron_tsft.checkpoint.mapping import (
    Index,
    Segment,
    Shape,
    TableRow,
    extra_state_keys,
    megatron_shape,
    model_shapes,
    segments,
    sizes,
)
from megatron_tsft.checkpoint.memory import Ring
from megatron_tsft.checkpoint.torch_dist import Box
from megatron_tsft.checkpoint.torch_dist_reader import CheckpointReader

# tensors are written in boxes of about this size: a bound on memory, not part of the format
BOX_BYTES = 32 * 2**20
# (tensor name, first row, end row) -> those rows
ReadRows = Callable[[str, int, int], torch.Tensor]


@dataclass(frozen=True)
class ConversionUnit:
    """One row of the table at one index of its leading dimensions.

    Attributes:
        names, shapes: of its Hugging Face tensors.
        segments: where their rows lie in the Megatron tensor at this index.
        global_shape: of the whole Megatron tensor.
    """

    row: TableRow
    index: Index
    names: tuple[str, ...]
    shapes: tuple[Shape, ...]
    segments: list[Segment]
    global_shape: Shape

    @property
    def rows(self) -> int:
        """Rows of the Megatron tensor at this index, padding included."""
        return self.global_shape[len(self.index)]

    @property
    def columns(self) -> Shape:
        """What follows the rows in the shape: (columns,) of a matrix, () of a vector."""
        return self.global_shape[len(self.index) + 1 :]


def units(card: ModelCard) -> list[ConversionUnit]:
    """Everything that is converted, in the order embedding, layer by layer, rest."""
    arguments, family = card.megatron_arguments, get_family(card.family)
    before, layers, after = [], [], []
    for row in family.active_rows(arguments):
        shapes = row.shapes(sizes(arguments, card.vocab_size))
        places = segments(row, shapes, arguments, card.padded_vocab_size)
        whole = megatron_shape(row, arguments, card.vocab_size, card.padded_vocab_size)
        own = [
            ConversionUnit(row, index, row.names(index), shapes, places, whole)
            for index in row.indices(arguments)
        ]
        (layers if own[0].index else after if layers else before).extend(own)
    return before + sorted(layers, key=lambda unit: unit.index[0]) + after


def count_tensors(card: ModelCard) -> int:
    """How many Hugging Face tensors the card's model has."""
    arguments = card.megatron_arguments
    return sum(
        len(row.sources) * math.prod(row.leading(arguments))
        for row in get_family(card.family).active_rows(arguments)
    )


def expected_keys(card: ModelCard) -> dict[str, Shape]:
    """Megatron key -> global shape of every weight of the card's model."""
    return model_shapes(
        get_family(card.family), card.megatron_arguments, card.vocab_size, card.padded_vocab_size
    )


def extra_states(card: ModelCard) -> list[str]:
    """The keys of the `_extra_state` objects that the card's model may ask for, on any layers."""
    return extra_state_keys(get_family(card.family), card.megatron_arguments)


def hf_shapes(steps: list[ConversionUnit]) -> dict[str, Shape]:
    """Name -> shape of every Hugging Face tensor, in the order of the units."""
    return {
        name: shape for unit in steps for name, shape in zip(unit.names, unit.shapes, strict=True)
    }


def boxes_of(unit: ConversionUnit, dtype: torch.dtype, read: ReadRows) -> Iterator[Box]:
    """The unit's part of the Megatron tensor, in boxes of a row or of at most BOX_BYTES."""
    per_box = max(1, BOX_BYTES // (torch.Size(unit.columns).numel() * dtype.itemsize))
    for start in range(0, unit.rows, per_box):
        stop = min(start + per_box, unit.rows)
        yield Box(
            key=unit.row.megatron,
            global_shape=unit.global_shape,
            offsets=(*unit.index, start, *(0 for _ in unit.columns)),
            sizes=(*(1 for _ in unit.index), stop - start, *unit.columns),
            dtype=dtype,
            fill=functools.partial(_fill, unit, start, stop, read),
        )


def _fill(unit: ConversionUnit, start: int, stop: int, read: ReadRows, box: torch.Tensor) -> None:
    """Rows [start, stop) of the Megatron tensor at the unit's index, into a box of their size."""
    target = box.view(stop - start, *unit.columns)
    for segment in unit.segments:
        low, high = max(start, segment.target), min(stop, segment.target + segment.length)
        if low >= high:
            continue
        if segment.source is None:
            target[low - start : high - start] = 0
        else:
            shift = segment.start - segment.target
            target[low - start : high - start] = read(
                unit.names[segment.source], low + shift, high + shift
            )


@dataclass(frozen=True)
class Piece:
    """Consecutive rows of one Hugging Face tensor, from row `start`; the third piece after it takes
    their memory."""

    name: str
    start: int
    rows: torch.Tensor


def pieces_of(
    steps: Iterable[ConversionUnit],
    reader: CheckpointReader,
    dtypes: Mapping[str, torch.dtype] | None = None,
) -> Iterator[Piece]:
    """The units' Hugging Face tensors in the order of their names, in pieces of at most BOX_BYTES
    (at least one row).

    dtypes: by name; None leaves the rows in the checkpoint's dtype.
    """
    stored, cast = Ring(), Ring()
    for unit in steps:
        kind = reader.tensor(unit.row.megatron).properties.dtype
        widest = max([kind.itemsize, *(dtypes[name].itemsize for name in unit.names if dtypes)])
        per_piece = max(1, BOX_BYTES // (torch.Size(unit.columns).numel() * widest))
        ones, zeros = tuple(1 for _ in unit.index), tuple(0 for _ in unit.columns)
        for source, name in enumerate(unit.names):
            own = sorted(
                (s for s in unit.segments if s.source == source), key=lambda segment: segment.start
            )
            for segment in own:
                for done in range(0, segment.length, per_piece):
                    count = min(per_piece, segment.length - done)
                    offsets = (*unit.index, segment.target + done, *zeros)
                    box = stored.take((*ones, count, *unit.columns), kind)
                    rows = reader.read(unit.row.megatron, offsets, tuple(box.shape), box).view(
                        count, *unit.columns
                    )
                    if dtypes and dtypes[name] != kind:
                        rows = cast.take(tuple(rows.shape), dtypes[name]).copy_(rows)
                    yield Piece(name, segment.start + done, rows)
