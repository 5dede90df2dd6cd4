"""What an objective is made of: statistics in, coefficients out, parameters with their ranges."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from torch import Tensor

from megatron_tsft.names import did_you_mean

Scalar = float | Tensor
TeacherUse = Literal["none", "optional", "required"]

ALWAYS = ("logp_y", "p_y", "nll")
ON_DEMAND = (
    "entropy",  # H(p), over the true vocabulary
    "collision",  # sum p^2
    "topk_entropy",  # entropy of the renormalised top-k of p, k = the row's parameter top_k
    "topk_log_k",  # log of that k (never more than the vocabulary)
    "teacher_logp_y",  # log T(y)
    "reference_logp_y",  # log p_ref(y): reference_logprobs=, or T(y)
    "sequence_log_ratio",  # mean over the token's sequence of log p(y) - log p_ref(y)
)
READ_A_REFERENCE = frozenset({"reference_logp_y", "sequence_log_ratio"})


@dataclass(frozen=True)
class Range:
    """The closed interval a parameter must lie in; `above` makes the lower end open."""

    low: float = -math.inf
    high: float = math.inf
    above: bool = False

    def holds(self, value: float) -> bool:
        """Whether `value` is finite and lies inside."""
        return (
            math.isfinite(value)
            and self.low <= value <= self.high
            and not (self.above and value == self.low)
        )

    def __str__(self) -> str:
        if self.low == -math.inf:
            return "any finite number" if self.high == math.inf else f"at most {self.high:g}"
        if self.high == math.inf:
            return f"above {self.low:g}" if self.above else f"at least {self.low:g}"
        return (
            f"{'above' if self.above else 'from'} {self.low:g} {'up ' if self.above else ''}to"
            f" {self.high:g}"
        )


Unit = Annotated[Scalar, Range(0, 1)]
NonNegative = Annotated[Scalar, Range(0)]
Positive = Annotated[Scalar, Range(0, above=True)]
Real = Annotated[Scalar, Range()]
Count = Annotated[int, Range(2, 4096)]


@dataclass(frozen=True)
class Coefficients:
    """What a row decides per token: numbers or [...] tensors. `a` and `b` may depend on parameters
    only.

    A row whose residual is the number 0 whatever its parameters are has none: nothing is then
    computed for pi.
    """

    imitation: Scalar = 1.0
    residual: Scalar = 0.0
    a: Scalar = 0.0
    b: Scalar = 0.0


@dataclass(frozen=True)
class Residual:
    """What is known of the residual before any statistic is.

    Attributes:
        exists: whether there is one; a weight that is 0 at this step still makes one, because a
            schedule must not change the program.
        a, b: pi = softmax(a * z + b * log T); numbers, 0-dim or per-token tensors.
    """

    exists: bool
    a: Scalar
    b: Scalar


class Statistics(dict[str, Tensor]):
    """Named per-token tensors [...] in fp32 (fp64 for fp64 logits): stats.logp_y."""

    def __getattr__(self, name: str) -> Tensor:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(
                f"statistic {name!r} was not computed: declare it, register(...,"
                f" needs=({name!r},)); here are: {', '.join(sorted(self))}; known:"
                f" {', '.join(ALWAYS + ON_DEMAND)}"
            ) from None


@dataclass(frozen=True)
class Parameter:
    """One keyword of a row: its default and its range."""

    name: str
    default: float
    range: Range
    integer: bool

    def check(self, objective: str, value: Any) -> None:
        """Raise ValueError or TypeError where `value` is no number or out of range. Tensors are
        looked at on the CPU only: a device would have to be waited for."""
        numbers: list[float] = []
        if isinstance(value, Tensor):
            if self.integer:
                raise TypeError(
                    f"{objective}: {self.name} decides shapes and must be an int, not a tensor"
                )
            if value.device.type == "cpu" and value.numel() > 0:
                numbers = [float(value.min()), float(value.max())]
        elif isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(
                f"{objective}: {self.name} must be a number or a per-token tensor, not {value!r}"
            )
        elif self.integer and not float(value).is_integer():
            raise TypeError(f"{objective}: {self.name} must be an integer, not {value!r}")
        else:
            numbers = [float(value)]
        for number in numbers:
            if not self.range.holds(number):
                raise ValueError(
                    f"{objective}: {self.name}={number:g} is out of range: it must be {self.range}"
                )


@dataclass(frozen=True)
class Row:
    """One entry of the catalogue.

    Attributes:
        name: what `get` and `--tsft-objective` call it.
        function: statistics and parameters -> Coefficients.
        source: where it is published.
        needs: the statistics that it reads beyond those that are always there.
        teacher: whether it reads a second distribution.
        token_weights: whether it means nothing without per-token weights.
        ordered: pairs of parameters of which the first must not exceed the second.
        parameters: its keywords.
        has_residual: False where the residual is the number 0 whatever the parameters are.
    """

    name: str
    function: Callable[..., Coefficients]
    source: str
    needs: tuple[str, ...]
    teacher: TeacherUse
    token_weights: bool
    ordered: tuple[tuple[str, str], ...]
    parameters: Mapping[str, Parameter]
    has_residual: bool

    @property
    def formula(self) -> str:
        """The function's docstring, on one line."""
        return " ".join((self.function.__doc__ or "").split())

    def complete(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """The parameters, checked, with defaults for those that are missing.

        Raises:
            ValueError: an unknown parameter, a value out of range, or a pair in the wrong order.
            TypeError: a value that is no number and no tensor.
        """
        for key, value in parameters.items():
            if key not in self.parameters:
                valid = ", ".join(self.parameters) or "it has none"
                close = did_you_mean(key, self.parameters)
                raise ValueError(
                    f"objective {self.name!r} has no parameter {key!r}{close}; valid: {valid}"
                )
            self.parameters[key].check(self.name, value)
        values = {key: parameters.get(key, p.default) for key, p in self.parameters.items()}
        for low, high in self.ordered:
            v, w = values[low], values[high]
            if isinstance(v, (int, float)) and isinstance(w, (int, float)) and v > w:
                raise ValueError(f"{self.name}: {low}={v:g} must not exceed {high}={w:g}")
        return values
