"""Which objectives there are: a row is registered, found by its name, and given its parameters."""

import inspect
import runpy
from collections.abc import Callable, Sequence
from typing import Any, get_args

import torch
from torch import Tensor

from megatron_tsft.names import did_you_mean
from megatron_tsft.objectives.definition import (
    ON_DEMAND,
    Coefficients,
    Parameter,
    Range,
    Row,
    Scalar,
    TeacherUse,
)
from megatron_tsft.objectives.objective import (
    Mixture,
    Objective,
    SingleObjective,
    ask_before_statistics,
)
from megatron_tsft.objectives.schedules import Schedule, parse_schedule

_ROWS: dict[str, Row] = {}


def register(
    name: str,
    *,
    source: str,
    needs: Sequence[str] = (),
    teacher: TeacherUse = "none",
    token_weights: bool = False,
    ordered: Sequence[tuple[str, str]] = (),
) -> Callable[[Callable[..., Coefficients]], Callable[..., Coefficients]]:
    """Add an objective: decorate `f(stats, *, parameter: Annotated[float, Range(...)] = default) ->
    Coefficients`.

    Args:
        name: the name for `get` and `--tsft-objective`.
        source: where it is published, such as "arXiv:2606.11189".
        needs: statistics beyond logp_y, p_y and nll that the function reads (`ON_DEMAND`).
        teacher: whether pi or the coefficients read T: "none", "optional" (only where b != 0) or
            "required".
        token_weights: True where the objective means nothing without per-token weights.
        ordered: pairs of parameters of which the first must not exceed the second.

    Raises:
        ValueError: the name is taken, a statistic is unknown, a parameter has no default, or `a` or
            `b` depends on a statistic.
    """
    if name in _ROWS:
        raise ValueError(
            f"objective {name!r} is registered already ({_ROWS[name].source}): choose another name"
        )
    for need in needs:
        if need not in ON_DEMAND:
            raise ValueError(
                f"objective {name!r}: unknown statistic {need!r}; known: {', '.join(ON_DEMAND)}"
            )
    if teacher not in get_args(TeacherUse):
        raise ValueError(
            f"objective {name!r}: teacher={teacher!r}; valid: {', '.join(get_args(TeacherUse))}"
        )

    def add(function: Callable[..., Coefficients]) -> Callable[..., Coefficients]:
        parameters = _parameters(name, function)
        entry = Row(
            name,
            function,
            source,
            tuple(needs),
            teacher,
            token_weights,
            tuple(ordered),
            parameters,
            has_residual=_has_residual(function, parameters),
        )
        SingleObjective(entry, entry.complete({}))  # refuses an a or b that depends on a statistic
        _ROWS[name] = entry
        return function

    return add


def _parameters(name: str, function: Callable[..., Coefficients]) -> dict[str, Parameter]:
    """The keywords of a row, read from its signature."""
    parameters: dict[str, Parameter] = {}
    # eval_str: under `from __future__ import annotations`
    # an annotation is its text, and its Range would be lost
    for key, p in list(inspect.signature(function, eval_str=True).parameters.items())[1:]:
        if p.default is inspect.Parameter.empty:
            raise ValueError(f"objective {name!r}: parameter {key!r} needs a default")
        metadata = getattr(p.annotation, "__metadata__", ())
        limits = next((m for m in metadata if isinstance(m, Range)), Range())
        integer = p.annotation is int or getattr(p.annotation, "__origin__", None) is int
        parameters[key] = Parameter(key, p.default, limits, integer)
    return parameters


def _has_residual(function: Callable[..., Coefficients], parameters: dict[str, Parameter]) -> bool:
    """Whether a row has a residual, whatever the values of its parameters.

    Asked with tensors, as a schedule gives them: a weight that depends on one comes back as a
    tensor, and the number 0 comes back only where there is no residual at all.
    """
    tensors: dict[str, Any] = {
        key: p.default if p.integer else torch.tensor(p.default, dtype=torch.float64)
        for key, p in parameters.items()
    }
    residual = ask_before_statistics(function, tensors).residual
    return isinstance(residual, Tensor) or residual != 0


def names() -> list[str]:
    """Every registered objective, in the catalogue's order."""
    return list(_ROWS)


def row(name: str) -> Row:
    """The catalogue's entry: source, formula, parameters.

    Raises:
        ValueError: no such objective; the message lists the valid ones.
    """
    if name not in _ROWS:
        close = did_you_mean(name, names())
        raise ValueError(f"unknown objective {name!r}{close}; valid: {', '.join(names())}")
    return _ROWS[name]


def load_plugin(file: str) -> list[str]:
    """Run a user's Python file that calls `register`; return the names it added.

    Raises:
        ValueError: the file registered nothing.
        FileNotFoundError: there is no such file.
    """
    before = set(_ROWS)
    runpy.run_path(file)
    added = [name for name in _ROWS if name not in before]
    if not added:
        raise ValueError(
            f"plugin {file} registered no objective: decorate a function with"
            " objectives.register(...)"
        )
    return added


def get(name: str, **parameters: Scalar | Schedule) -> SingleObjective:
    """The objective `name` with its parameters: numbers, per-token tensors of the labels' shape, or
    schedules.

    A scheduled parameter is a 0-dim tensor that `set_step` fills; until then it has its first
    value.

    Raises:
        ValueError: unknown name or parameter (the message lists the valid ones), or a value out of
            range.
        TypeError: a value that is no number, no tensor and no schedule, or a schedule for an
            integer.
    """
    entry = row(name)
    schedules = {key: value for key, value in parameters.items() if isinstance(value, Schedule)}
    first = {key: schedule.start for key, schedule in schedules.items()}
    last = {key: schedule.stop for key, schedule in schedules.items()}
    for ends in (first, last):  # a schedule stays between them
        entry.complete(parameters | ends)
    for key in schedules:
        if entry.parameters[key].integer:
            raise TypeError(f"{name}: {key} decides shapes and cannot be scheduled: pass a number")
    scheduled = {key: torch.tensor(value, dtype=torch.float64) for key, value in first.items()}
    return SingleObjective(entry, entry.complete(parameters | scheduled), schedules)


def parse(text: str) -> SingleObjective:
    """An objective from a command line: "target-sft,eta=0.5". Raises like `get`."""
    name, *pairs = [part.strip() for part in text.split(",")]
    return get(name, **parse_parameters(pairs))


def parse_parameters(pairs: Sequence[str]) -> dict[str, float | Schedule]:
    """{"eta": 0.5} from ["eta=0.5"]; {"eta": Schedule(...)} from ["eta=linear:0:0.5:1000"].

    Raises:
        ValueError: a pair is not name=number or name=schedule.
    """
    parameters: dict[str, float | Schedule] = {}
    for pair in pairs:
        key, separator, value = pair.partition("=")
        if ":" in value:
            parameters[key.strip()] = parse_schedule(value.strip())
            continue
        try:
            number = float(value if separator else "")
        except ValueError:
            raise ValueError(
                f"objective parameter {pair!r} must be written name=number, such as eta=0.5, or"
                " name=schedule, such as eta=linear:0:0.5:1000"
            ) from None
        parameters[key.strip()] = (
            int(number) if number.is_integer() and "." not in value else number
        )
    return parameters


def mixture(members: Sequence[Objective], index: Tensor) -> Mixture:
    """Several objectives in one batch: `index` [...] int64 says which member each token follows.

    Raises:
        ValueError: no members, or an index outside them (checked on CPU).
        TypeError: `index` is not int64.
    """
    if not members:
        raise ValueError("a mixture needs at least one objective")
    if index.dtype != torch.int64:
        raise TypeError(f"mixture index must be int64, not {index.dtype}")
    if (
        index.device.type == "cpu"
        and index.numel()
        and not 0 <= int(index.min()) <= int(index.max()) < len(members)
    ):
        raise ValueError(
            f"mixture index must lie in [0, {len(members)}), got"
            f" {int(index.min())}..{int(index.max())}"
        )
    return Mixture(members, index)
