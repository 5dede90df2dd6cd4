"""The catalogue: one row per objective, each a choice of how far to trust the label and how to
spread the rest.

Every row returns the coefficients of one formula (design of arXiv 2606.11189, generalised), per
token:

    loss = imitation * CE(onehot(y), p) + residual * CE(pi, p),    pi = softmax(a * z + b * log T),
    detached

with p = softmax(z), y the observed token and T a frozen second distribution ("the teacher").
Notation in the rows: c_y is `imitation` (the paper's gamma), c_r is `residual`, H the entropy of p.
Imports torch only.
"""

import inspect
import math
import runpy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

import torch
from torch import Tensor

from megatron_tsft.schedules import Schedule, parse_schedule

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


@dataclass(frozen=True)
class Range:
    """The closed interval a parameter must lie in; `above` makes the lower end open."""

    low: float = -math.inf
    high: float = math.inf
    above: bool = False

    def holds(self, value: float) -> bool:
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

    A residual left at the number 0 means that the row has none (nothing is then computed for pi).
    """

    imitation: Scalar = 1.0
    residual: Scalar = 0.0
    a: Scalar = 0.0
    b: Scalar = 0.0


class Statistics(dict[str, Tensor]):
    """Named per-token tensors [...] in fp32 (fp64 for fp64 logits), read as attributes:
    stats.logp_y."""

    def __getattr__(self, name: str) -> Tensor:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(
                f"statistic {name!r} was not computed: declare it, register(...,"
                f" needs=({name!r},)); "
                f"here are: {', '.join(sorted(self))}; known: {', '.join(ALWAYS + ON_DEMAND)}"
            ) from None


@dataclass(frozen=True)
class Parameter:
    """One keyword of a row: its default and its range."""

    name: str
    default: float
    range: Range
    integer: bool

    def check(self, objective: str, value: Any) -> None:
        """Raise ValueError or TypeError where `value` is no number or out of range (tensors: on
        CPU, at no sync)."""
        if isinstance(value, Tensor):
            if self.integer:
                raise TypeError(
                    f"{objective}: {self.name} decides shapes and must be an int, not a tensor"
                )
            bad = value.device.type == "cpu" and value.numel() > 0
            values = [float(value.min()), float(value.max())] if bad else []
        elif isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(
                f"{objective}: {self.name} must be a number or a per-token tensor, not {value!r}"
            )
        elif self.integer and not float(value).is_integer():
            raise TypeError(f"{objective}: {self.name} must be an integer, not {value!r}")
        else:
            values = [float(value)]
        for number in values:
            if not self.range.holds(number):
                raise ValueError(
                    f"{objective}: {self.name}={number:g} is out of range: it must be {self.range}"
                )


@dataclass(frozen=True)
class Row:
    """One entry of the catalogue."""

    name: str
    function: Callable[..., Coefficients]
    source: str
    needs: tuple[str, ...]
    teacher: TeacherUse
    token_weights: bool
    ordered: tuple[tuple[str, str], ...]
    parameters: Mapping[str, Parameter]

    @property
    def formula(self) -> str:
        return inspect.cleandoc(self.function.__doc__ or "")


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
        parameters = {}
        # eval_str: under `from __future__ import annotations` an annotation is its text, and its
        # Range would be lost
        for key, p in list(inspect.signature(function, eval_str=True).parameters.items())[1:]:
            if p.default is inspect.Parameter.empty:
                raise ValueError(f"objective {name!r}: parameter {key!r} needs a default")
            metadata = getattr(p.annotation, "__metadata__", ())
            limits = next((m for m in metadata if isinstance(m, Range)), Range())
            integer = p.annotation is int or getattr(p.annotation, "__origin__", None) is int
            parameters[key] = Parameter(key, p.default, limits, integer)
        entry = Row(
            name, function, source, tuple(needs), teacher, token_weights, tuple(ordered), parameters
        )
        # on the host, where looking at a and b is free
        Objective(entry, {key: p.default for key, p in parameters.items()}).residual_plan()
        _ROWS[name] = entry
        return function

    return add


def names() -> list[str]:
    """Every registered objective, in the catalogue's order."""
    return list(_ROWS)


def row(name: str) -> Row:
    """The catalogue's entry: source, formula, parameters.

    Raises:
        ValueError: no such objective; the message lists the valid ones.
    """
    if name not in _ROWS:
        raise ValueError(f"unknown objective {name!r}; valid: {', '.join(names())}")
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


def _flat(what: str, value: Any, shape: torch.Size) -> Any:
    if not isinstance(value, Tensor) or value.dim() == 0:
        return value
    try:
        return value.broadcast_to(shape).reshape(-1)
    except RuntimeError:
        raise ValueError(
            f"{what} has shape {tuple(value.shape)}: it must broadcast to the labels'"
            f" {tuple(shape)}"
        ) from None


class Objective:
    """A row with its parameters set: what the loss asks for targets. Make one with `get` or
    `mixture`."""

    def __init__(
        self,
        entry: Row,
        parameters: Mapping[str, Any],
        schedules: Mapping[str, Schedule] | None = None,
    ):
        self.row = entry
        self.parameters = dict(parameters)
        self.schedules = dict(schedules or {})

    def __repr__(self) -> str:
        given = (
            f"{k}={v:g}" if isinstance(v, (int, float)) else f"{k}=tensor"
            for k, v in self.parameters.items()
        )
        scheduled = {key: f"{key}={schedule}" for key, schedule in self.schedules.items()}
        return ", ".join(
            [
                self.name,
                *(scheduled.get(k, text) for k, text in zip(self.parameters, given, strict=True)),
            ]
        )

    def to(self, device: torch.device | str) -> "Objective":
        """The same with its tensors on a device; scheduled parameters are copies of their own."""
        moved = {
            k: v.to(device, copy=True) if isinstance(v, Tensor) else v
            for k, v in self.parameters.items()
        }
        return Objective(self.row, moved, self.schedules)

    def set_step(self, step: int) -> None:
        """Give scheduled parameters their values of a 0-based training step, in place, without
        asking the device."""
        for key, schedule in self.schedules.items():
            self.parameters[key].fill_(schedule.value(step))

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
        """Whether a teacher that is given is read, be it as a reference only."""
        return self.teacher != "none" or bool(
            self.needs & {"reference_logp_y", "sequence_log_ratio"}
        )

    @property
    def requires_token_weights(self) -> bool:
        return self.row.token_weights

    @property
    def top_ks(self) -> tuple[int, ...]:
        """The k of each top-k entropy that the rows read."""
        return (int(self.parameters["top_k"]),) if "topk_entropy" in self.needs else ()

    def flatten(self, shape: torch.Size) -> "Objective":
        """The same with per-token parameters [...] as [N]; 0-dim tensors stay.

        Raises:
            ValueError: a tensor that does not broadcast to the labels' shape.
        """
        flat = {k: _flat(f"{self.name}: {k}", v, shape) for k, v in self.parameters.items()}
        return Objective(self.row, flat, self.schedules)

    def where_needs(self, *needs: str) -> bool | Tensor:
        """Which tokens read one of these statistics: a bool for all of them, or a flat bool
        tensor."""
        return bool(self.needs & set(needs))

    def coefficients(self, stats: Statistics) -> Coefficients:
        """c_y, c_r, a and b from merged statistics; tensors broadcast against [...]."""
        k = self.top_ks
        if k:  # one entropy per k was computed; the row reads its own
            stats = Statistics(
                stats,
                topk_entropy=stats[f"topk_entropy_{k[0]}"],
                topk_log_k=stats[f"topk_log_k_{k[0]}"],
            )
        return self.row.function(stats, **self.parameters)

    def residual_plan(self, device: torch.device | str = "cpu") -> Coefficients:
        """What is known before any statistic is: a, b, and whether there is a residual (the number
        0: none).

        The row is asked with NaN statistics, on the device of its parameters: what comes back
        finite depends on parameters alone.
        """
        nan = torch.full((), math.nan, device=device)
        plan = self.row.function(
            Statistics({name: nan for name in ALWAYS + ON_DEMAND}), **self.parameters
        )
        for key in ("a", "b"):
            value = getattr(plan, key)
            on_host = not isinstance(value, Tensor) or value.device.type == "cpu"
            if on_host and not bool(torch.isfinite(torch.as_tensor(value)).all()):
                raise ValueError(
                    f"objective {self.name!r}: {key} must depend on parameters only, not on"
                    " statistics"
                )
        return plan


class Mixture(Objective):
    """Several objectives in one batch: token i follows members[index[i]]."""

    def __init__(self, members: Sequence[Objective], index: Tensor):
        self.members, self.index = tuple(members), index

    def __repr__(self) -> str:
        return " | ".join(map(repr, self.members))

    @property
    def name(self) -> str:
        return "mixture(" + ", ".join(member.name for member in self.members) + ")"

    @property
    def needs(self) -> frozenset[str]:
        return frozenset().union(*(member.needs for member in self.members))

    @property
    def teacher(self) -> TeacherUse:
        uses = {member.teacher for member in self.members}
        return next(use for use in ("required", "optional", "none") if use in uses)

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

    def where_needs(self, *needs: str) -> bool | Tensor:
        out = torch.zeros_like(self.index, dtype=torch.bool)
        for i, member in enumerate(self.members):
            if member.needs & set(needs):
                out = out | (self.index == i)
        return out

    def _select(self, parts: Sequence[Coefficients], key: str, dtype: torch.dtype) -> Scalar:
        values = [getattr(part, key) for part in parts]
        if all(not isinstance(v, Tensor) and v == values[0] for v in values):
            return values[0]
        index = self.index  # flat by now
        out = torch.zeros(index.shape, dtype=dtype, device=index.device)
        for i, v in enumerate(values):
            out = torch.where(index == i, as_like(v, out), out)
        return out

    def _merge(self, parts: Sequence[Coefficients], dtype: torch.dtype) -> Coefficients:
        keys = ("imitation", "residual", "a", "b")
        return Coefficients(**{key: self._select(parts, key, dtype) for key in keys})

    def coefficients(self, stats: Statistics) -> Coefficients:
        return self._merge(
            [member.coefficients(stats) for member in self.members], stats.logp_y.dtype
        )

    def residual_plan(self, device: torch.device | str = "cpu") -> Coefficients:
        # fp64 keeps fp64 parameters; the loss rounds a and b to its own working type
        return self._merge([member.residual_plan(device) for member in self.members], torch.float64)


def get(name: str, **parameters: Scalar | Schedule) -> Objective:
    """The objective `name` with its parameters: numbers, per-token tensors of the labels' shape, or
    schedules.

    A scheduled parameter is a 0-dim tensor that `Objective.set_step` fills; until then it has its
    first value.

    Raises:
        ValueError: unknown name or parameter (the message lists the valid ones), or a value out of
            range.
        TypeError: a value that is no number, no tensor and no schedule, or a schedule for an
            integer.
    """
    entry, schedules = row(name), {k: v for k, v in parameters.items() if isinstance(v, Schedule)}
    if schedules:
        first, last = (
            {k: getattr(v, end) for k, v in schedules.items()} for end in ("start", "stop")
        )
        for ends in (first, last):  # a schedule stays between them
            get(name, **(parameters | ends))
        for key in schedules:
            if entry.parameters[key].integer:
                raise TypeError(
                    f"{name}: {key} decides shapes and cannot be scheduled: pass a number"
                )
        scheduled = {k: torch.tensor(v, dtype=torch.float64) for k, v in first.items()}
        return Objective(entry, get(name, **(parameters | scheduled)).parameters, schedules)
    for key, value in parameters.items():
        if key not in entry.parameters:
            valid = ", ".join(entry.parameters) or "it has none"
            raise ValueError(f"objective {name!r} has no parameter {key!r}; valid: {valid}")
        entry.parameters[key].check(name, value)
    values = {key: parameters.get(key, p.default) for key, p in entry.parameters.items()}
    for low, high in entry.ordered:
        v, w = values[low], values[high]
        if isinstance(v, (int, float)) and isinstance(w, (int, float)) and v > w:
            raise ValueError(f"{name}: {low}={v:g} must not exceed {high}={w:g}")
    return Objective(entry, values)


def parse(text: str) -> Objective:
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
            number = float(value)
        except ValueError:
            separator = ""
        if not separator:
            raise ValueError(
                f"objective parameter {pair!r} must be written name=number, such as eta=0.5, or"
                " name=schedule, such as eta=linear:0:0.5:1000"
            )
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


# ---- what rows share -----------------------------------------------------------------------------


def as_like(value: Scalar, like: Tensor) -> Tensor:
    """`value` as a tensor of `like`'s type and device; a number is added, not copied, for which the
    host would wait."""
    return (torch.zeros((), dtype=like.dtype, device=like.device) + value).to(like.dtype)


def keep(weight: Scalar) -> Scalar:
    """A residual weight that stays a residual at 0: a schedule that starts at 0 must not change the
    program."""
    return weight if isinstance(weight, Tensor) else torch.tensor(weight, dtype=torch.float64)


def log_expm1(x: Tensor) -> Tensor:
    """log(e^x - 1) for x >= 0 without overflow."""
    return x + torch.log(-torch.expm1(-x))


# ---- the rows ------------------------------------------------------------------------------------


@register("sft", source="maximum likelihood")
def sft(s: Statistics) -> Coefficients:
    """-log p(y): c_y = 1"""
    return Coefficients(imitation=1.0)


@register("dft", source="arXiv:2508.05629")
def dft(s: Statistics) -> Coefficients:
    """-sg[p(y)] log p(y): c_y = p(y)"""
    return Coefficients(imitation=s.p_y)


@register("beyond-log", source="arXiv:2510.00526")
def beyond_log(s: Statistics, *, alpha: NonNegative = 1.0) -> Coefficients:
    """(1 - p(y)^alpha) / alpha, -log p(y) at alpha = 0: c_y = p(y)^alpha"""
    return Coefficients(imitation=torch.exp(alpha * s.logp_y))


@register("profit", source="arXiv:2601.09195")
def profit(s: Statistics, *, threshold: Unit = 0.1) -> Coefficients:
    """-1[p(y) > threshold] log p(y): c_y = 1[p(y) > threshold]"""
    return Coefficients(imitation=(s.p_y > threshold).to(s.p_y.dtype))


@register("eaft", source="arXiv:2601.02151", needs=("topk_entropy", "topk_log_k"))
def eaft(s: Statistics, *, top_k: Count = 20, power: NonNegative = 1.0) -> Coefficients:
    """-(H_topk / log k)^power log p(y), H over the renormalised k most likely tokens: c_y = (H_topk
    / log k)^power"""
    return Coefficients(imitation=(s.topk_entropy / s.topk_log_k).clamp(0, 1) ** power)


@register(
    "iw-sft",
    source="arXiv:2507.12856",
    needs=("sequence_log_ratio",),
    ordered=[("clip_min", "clip_max")],
)
def iw_sft(
    s: Statistics,
    *,
    temperature: NonNegative = 1.0,
    clip_min: NonNegative = 0.0,
    clip_max: NonNegative = 16.0,
) -> Coefficients:
    """-w log p(y), w = clamp(exp(temperature * mean_sequence(log p(y) - log p_ref(y))), clip_min,
    clip_max): c_y = w"""
    w = torch.exp(temperature * s.sequence_log_ratio)
    return Coefficients(imitation=torch.clamp(w, as_like(clip_min, w), as_like(clip_max, w)))


@register("critical", source="arXiv:2510.10974", token_weights=True)
def critical(s: Statistics) -> Coefficients:
    """-c log p(y), c = token_weights (1 on critical tokens, else 0), which are required: c_y = 1"""
    return Coefficients(imitation=1.0)


@register("deft", source="arXiv:2602.11424", needs=("collision",))
def deft(s: Statistics) -> Coefficients:
    """(1 - p(y)^a) / a, a = sg[sum p^2]: c_y = p(y)^(sum p^2)"""
    return Coefficients(imitation=torch.exp(s.collision * s.logp_y))


@register(
    "idft", source="arXiv:2602.12222", needs=("entropy",), ordered=[("weight_min", "weight_max")]
)
def idft(
    s: Statistics,
    *,
    threshold: Real = 0.0,
    temperature: Positive = 1.0,
    weight_min: NonNegative = 0.1,
    weight_max: NonNegative = 1.0,
) -> Coefficients:
    """-w log p(y): c_y = w = weight_max - (weight_max-weight_min) sigmoid(-(log p(y) + H -
    threshold) / temperature)"""
    gate = torch.sigmoid(-(s.logp_y + s.entropy - threshold) / temperature)
    return Coefficients(imitation=weight_max - (weight_max - weight_min) * gate)


@register("proximal", source="arXiv:2508.17784", needs=("reference_logp_y",))
def proximal(s: Statistics, *, clip_high: NonNegative = 0.28) -> Coefficients:
    """-min(r, clip(r, ., 1 + clip_high)), r = p(y) / p_ref(y): c_y = r where r <= 1 + clip_high,
    else 0"""
    r = torch.exp(s.logp_y - s.reference_logp_y)
    return Coefficients(imitation=torch.where(r <= 1 + clip_high, r, torch.zeros_like(r)))


@register("label-smoothing", source="arXiv:1512.00567")
def label_smoothing(s: Statistics, *, smoothing: Unit = 0.1) -> Coefficients:
    """(1 - smoothing) CE(onehot) + smoothing CE(uniform over the true vocabulary): c_y = 1 - c_r,
    c_r = smoothing"""
    return Coefficients(imitation=1 - smoothing, residual=keep(smoothing), a=0.0, b=0.0)


@register("sft-kl", source="arXiv:2509.04259", teacher="required")
def sft_kl(s: Statistics, *, kl_weight: NonNegative = 0.1) -> Coefficients:
    """-log p(y) + kl_weight KL(T || p): c_y = 1, c_r = kl_weight, pi = T"""
    return Coefficients(imitation=1.0, residual=keep(kl_weight), a=0.0, b=1.0)


@register("asft", source="arXiv:2509.23753", teacher="required")
def asft(s: Statistics, *, kl_weight: NonNegative = 0.05) -> Coefficients:
    """-sg[p(y)] log p(y) + kl_weight KL(T || p): c_y = p(y), c_r = kl_weight, pi = T"""
    return Coefficients(imitation=s.p_y, residual=keep(kl_weight), a=0.0, b=1.0)


@register("gem", source="arXiv:2408.16673")
def gem(s: Statistics, *, beta: Positive = 0.7) -> Coefficients:
    """CE(onehot) - CE(pi), pi = softmax(z / beta): c_y = 1, c_r = -1 (a signed target: no
    distribution)"""
    return Coefficients(imitation=1.0, residual=-1.0, a=1 / beta, b=0.0)


@register("kd", source="arXiv:1503.02531", teacher="required")
def kd(s: Statistics) -> Coefficients:
    """CE(T): c_y = 0, c_r = 1, pi = T"""
    return Coefficients(imitation=0.0, residual=1.0, a=0.0, b=1.0)


@register("kd-hybrid", source="arXiv:1503.02531", teacher="required")
def kd_hybrid(s: Statistics, *, teacher_weight: Unit = 0.5) -> Coefficients:
    """(1 - teacher_weight) CE(onehot) + teacher_weight CE(T): c_y = 1 - c_r, c_r = teacher_weight,
    pi = T"""
    return Coefficients(imitation=1 - teacher_weight, residual=keep(teacher_weight), a=0.0, b=1.0)


@register("gift", source="arXiv:2601.09233", needs=("teacher_logp_y",), teacher="required")
def gift(s: Statistics, *, beta: NonNegative = 20.0) -> Coefficients:
    """CE(softmax(log T + beta onehot(y))): c_y = 1 - c_r, c_r = 1 / (1 + T(y) expm1(beta)), pi =
    T"""
    # log(T(y) expm1(beta)) never overflows; c_r = sigmoid(-x) and c_y = sigmoid(x) never cancel
    x = s.teacher_logp_y + log_expm1(as_like(beta, s.logp_y))
    return Coefficients(imitation=torch.sigmoid(x), residual=torch.sigmoid(-x), a=0.0, b=1.0)


@register("target-sft", source="arXiv:2606.11189", teacher="optional")
def target_sft(s: Statistics, *, eta: Unit = 0.5) -> Coefficients:
    """CE(Q), Q = p(y) onehot(y) + (1 - p(y)) softmax((1 - eta) log p + eta log T): c_y = p(y), c_r
    = 1 - p(y)"""
    return Coefficients(imitation=s.p_y, residual=-torch.expm1(s.logp_y), a=1 - eta, b=eta)
