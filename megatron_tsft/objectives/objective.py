"""What the loss asks for targets: an `Objective`, one row with its parameters or a mixture."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_tsft.objectives.definition import (
    ALWAYS,
    ON_DEMAND,
    READ_A_REFERENCE,
    Coefficients,
    Residual,
    Row,
    Scalar,
    Statistics,
    TeacherUse,
)
from megatron_tsft.objectives.schedules import Schedule
from megatron_tsft.objectives.tensors import as_like


class Objective(Protocol):
    """What the loss asks for targets. Make one with `objectives.get` or `objectives.mixture`."""

    @property
    def name(self) -> str:
        """For messages."""
        ...

    @property
    def needs(self) -> frozenset[str]:
        """The statistics that it reads beyond those that are always there."""
        ...

    @property
    def teacher(self) -> TeacherUse:
        """Whether pi or the coefficients read T."""
        ...

    @property
    def reads_teacher(self) -> bool:
        """Whether a teacher that is there is read, be it as a reference only."""
        ...

    @property
    def requires_token_weights(self) -> bool:
        """Whether it means nothing without per-token weights."""
        ...

    @property
    def top_ks(self) -> tuple[int, ...]:
        """The k of each top-k entropy that is read."""
        ...

    def flatten(self, shape: torch.Size) -> "Objective":
        """The same with per-token tensors of the labels' shape [...] as [N]; 0-dim tensors stay.

        Raises:
            ValueError: a tensor that does not fit the labels' shape.
        """
        ...

    def where_needs(self, *needs: str) -> bool | Tensor:
        """Which tokens read one of these statistics: a bool for all of them, or a flat tensor."""
        ...

    def coefficients(self, stats: Statistics) -> Coefficients:
        """c_y, c_r, a and b from merged statistics; tensors broadcast against [...]."""
        ...

    def residual(self, device: torch.device | str = "cpu") -> Residual:
        """What is known before any statistic is; `device` is where the parameters are."""
        ...


def ask_before_statistics(
    function: Callable[..., Coefficients],
    parameters: Mapping[str, Any],
    device: torch.device | str = "cpu",
) -> Coefficients:
    """A row's answer to NaN statistics: what comes back finite depends on parameters alone."""
    nan = torch.full((), math.nan, device=device)
    return function(Statistics({name: nan for name in ALWAYS + ON_DEMAND}), **parameters)


class SingleObjective:
    """An `Objective`: one row with its parameters."""

    def __init__(
        self,
        entry: Row,
        parameters: Mapping[str, Any],
        schedules: Mapping[str, Schedule] | None = None,
    ):
        """`parameters`: all of the row's, as `Row.complete` gives them.

        Raises:
            ValueError: the row's a or b depends on a statistic.
        """
        self.row = entry
        self.parameters = dict(parameters)
        self.schedules = dict(schedules or {})
        self._constant: Residual | None = None
        if not any(isinstance(value, Tensor) for value in self.parameters.values()):
            answer = self.residual()
            if not isinstance(answer.a, Tensor) and not isinstance(answer.b, Tensor):
                self._constant = answer  # numbers alone serve every device and every call

    def __repr__(self) -> str:
        words = [self.name]
        for key, value in self.parameters.items():
            if key in self.schedules:
                words.append(f"{key}={self.schedules[key]}")
            else:
                words.append(f"{key}=tensor" if isinstance(value, Tensor) else f"{key}={value:g}")
        return ", ".join(words)

    @property
    def name(self) -> str:
        return self.row.name

    @property
    def needs(self) -> frozenset[str]:
        return frozenset(self.row.needs)

    @property
    def teacher(self) -> TeacherUse:
        return self.row.teacher

    @property
    def reads_teacher(self) -> bool:
        return self.teacher != "none" or bool(self.needs & READ_A_REFERENCE)

    @property
    def requires_token_weights(self) -> bool:
        return self.row.token_weights

    @property
    def top_ks(self) -> tuple[int, ...]:
        return (int(self.parameters["top_k"]),) if "topk_entropy" in self.needs else ()

    def flatten(self, shape: torch.Size) -> "SingleObjective":
        flat = {
            key: _flatten(f"{self.name}: {key}", value, shape)
            for key, value in self.parameters.items()
            if isinstance(value, Tensor) and value.dim()
        }
        if not flat:
            return self
        return SingleObjective(self.row, self.parameters | flat, self.schedules)

    def where_needs(self, *needs: str) -> bool:
        return bool(self.needs & set(needs))

    def coefficients(self, stats: Statistics) -> Coefficients:
        for k in self.top_ks:  # one entropy per k was computed; the row reads its own
            stats = Statistics(
                stats,
                topk_entropy=stats[f"topk_entropy_{k}"],
                topk_log_k=stats[f"topk_log_k_{k}"],
            )
        return self.row.function(stats, **self.parameters)

    def residual(self, device: torch.device | str = "cpu") -> Residual:
        if self._constant is not None:
            return self._constant
        answer = ask_before_statistics(self.row.function, self.parameters, device)
        for key, value in (("a", answer.a), ("b", answer.b)):
            on_host = not isinstance(value, Tensor) or value.device.type == "cpu"
            if on_host and not bool(torch.isfinite(torch.as_tensor(value)).all()):
                raise ValueError(
                    f"objective {self.name!r}: {key} must depend on parameters only, not on"
                    " statistics"
                )
        # a row that makes a plain number of its parameters shows a residual only where it is not 0
        shown = isinstance(answer.residual, Tensor) or answer.residual != 0
        return Residual(self.row.has_residual or shown, answer.a, answer.b)

    # what a training run asks beyond the loss

    def to(self, device: torch.device | str) -> "SingleObjective":
        """The same with its tensors on a device; scheduled parameters are copies of their own."""
        moved = {
            k: v.to(device, copy=True) if isinstance(v, Tensor) else v
            for k, v in self.parameters.items()
        }
        return SingleObjective(self.row, moved, self.schedules)

    def set_step(self, step: int) -> None:
        """Give scheduled parameters their values of a 0-based training step, in place, without
        asking the device."""
        for key, schedule in self.schedules.items():
            self.parameters[key].fill_(schedule.value(step))

    def at_step(self, step: int) -> "SingleObjective":
        """A copy whose scheduled parameters have their values of a 0-based training step; this one
        stays where it is."""
        values = {
            key: torch.full_like(self.parameters[key], schedule.value(step))
            for key, schedule in self.schedules.items()
        }
        return SingleObjective(self.row, self.parameters | values, self.schedules)


class Mixture:
    """An `Objective`: several in one batch, of which token i follows members[index[i]]."""

    def __init__(self, members: Sequence[Objective], index: Tensor):
        """`index`: [...] int64, of the labels' shape."""
        self.members, self.index = tuple(members), index

    def __repr__(self) -> str:
        return " | ".join(map(repr, self.members))

    @property
    def name(self) -> str:
        return "mixture(" + ", ".join(member.name for member in self.members) + ")"

    @property
    def needs(self) -> frozenset[str]:
        return frozenset[str]().union(*(member.needs for member in self.members))

    @property
    def teacher(self) -> TeacherUse:
        uses = {member.teacher for member in self.members}
        if "required" in uses:
            return "required"
        return "optional" if "optional" in uses else "none"

    @property
    def reads_teacher(self) -> bool:
        return any(member.reads_teacher for member in self.members)

    @property
    def requires_token_weights(self) -> bool:
        return any(member.requires_token_weights for member in self.members)

    @property
    def top_ks(self) -> tuple[int, ...]:
        return tuple(sorted({k for member in self.members for k in member.top_ks}))

    def flatten(self, shape: torch.Size) -> "Mixture":
        if self.index.shape != shape:
            raise ValueError(
                f"mixture index has shape {tuple(self.index.shape)}: it must be the labels',"
                f" {tuple(shape)}"
            )
        return Mixture([member.flatten(shape) for member in self.members], self.index.reshape(-1))

    def where_needs(self, *needs: str) -> Tensor:
        out = torch.zeros_like(self.index, dtype=torch.bool)
        for i, member in enumerate(self.members):
            if member.needs & set(needs):
                out = out | (self.index == i)
        return out

    def coefficients(self, stats: Statistics) -> Coefficients:
        parts, dtype = [member.coefficients(stats) for member in self.members], stats.logp_y.dtype
        return Coefficients(
            imitation=self._select([part.imitation for part in parts], dtype),
            residual=self._select([part.residual for part in parts], dtype),
            a=self._select([part.a for part in parts], dtype),
            b=self._select([part.b for part in parts], dtype),
        )

    def residual(self, device: torch.device | str = "cpu") -> Residual:
        parts = [member.residual(device) for member in self.members]
        # fp64 keeps fp64 parameters; the loss rounds a and b to its own working type
        return Residual(
            any(part.exists for part in parts),
            self._select([part.a for part in parts], torch.float64),
            self._select([part.b for part in parts], torch.float64),
        )

    def _select(self, values: Sequence[Scalar], dtype: torch.dtype) -> Scalar:
        """Each token's own of the members' values, [N]; one number where they all have it."""
        if all(not isinstance(value, Tensor) and value == values[0] for value in values):
            return values[0]
        out = torch.zeros(self.index.shape, dtype=dtype, device=self.index.device)
        for i, value in enumerate(values):
            out = torch.where(self.index == i, as_like(value, out), out)
        return out


def _flatten(what: str, value: Tensor, shape: torch.Size) -> Tensor:
    try:
        return value.broadcast_to(shape).reshape(-1)
    except RuntimeError:
        raise ValueError(
            f"{what} has shape {tuple(value.shape)}: it must broadcast to the labels'"
            f" {tuple(shape)}"
        ) from None
