"""The catalogue: what is in it, how parameters are checked, how a user adds a row, and that rows
stay short."""

import ast
import gc
import inspect
import re
import textwrap
from pathlib import Path
from typing import Annotated, Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tsft import objectives, q_target_cross_entropy
from megatron_tsft.objectives import Coefficients, Count, Mixture, Range, Statistics, registry
from tests.loss.published import NAMES
from tests.ranks import run_ranks

# the stable names of the design, with their defaults
PARAMETERS: dict[str, dict[str, float]] = {
    "sft": {},
    "dft": {},
    "beyond-log": {"alpha": 1},
    "profit": {"threshold": 0.1},
    "eaft": {"top_k": 20, "power": 1},
    "iw-sft": {"temperature": 1, "clip_min": 0, "clip_max": 16},
    "critical": {},
    "deft": {},
    "idft": {"threshold": 0, "temperature": 1, "weight_min": 0.1, "weight_max": 1},
    "proximal": {"clip_high": 0.28},
    "label-smoothing": {"smoothing": 0.1},
    "sft-kl": {"kl_weight": 0.1},
    "asft": {"kl_weight": 0.05},
    "gem": {"beta": 0.7},
    "kd": {},
    "kd-hybrid": {"teacher_weight": 0.5},
    "gift": {"beta": 20},
    "target-sft": {"eta": 0.5},
}


@pytest.fixture(autouse=True)
def own_catalogue(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is gone afterwards."""
    monkeypatch.setattr(registry, "_ROWS", dict(registry._ROWS))


# ---- the rows


def test_the_catalogue() -> None:
    assert objectives.names() == list(PARAMETERS) == NAMES
    for name, parameters in PARAMETERS.items():
        assert objectives.get(name).parameters == parameters
        assert {key: p.default for key, p in objectives.row(name).parameters.items()} == parameters


@pytest.mark.parametrize("name", PARAMETERS)
def test_every_row_is_documented_and_short(name: str) -> None:
    row = objectives.row(name)
    assert re.fullmatch(r"arXiv:\d{4}\.\d{5}|maximum likelihood", row.source)
    assert "c_y" in row.formula and "\n" not in row.formula
    assert all(key in row.formula or key == "top_k" for key in row.parameters), (
        "the formula leaves a parameter out"
    )
    [function] = ast.parse(textwrap.dedent(inspect.getsource(row.function))).body
    assert isinstance(function, ast.FunctionDef)
    body = function.body[1:]
    assert body and body[-1].end_lineno is not None
    assert body[-1].end_lineno - body[0].lineno + 1 < 10


@pytest.mark.parametrize("name", PARAMETERS)
def test_what_a_row_says_it_needs(name: str) -> None:
    """Given only what it declared, a row runs; without any one of these, it does not."""
    row = objectives.row(name)
    given = Statistics({key: torch.tensor([-0.5]) for key in (*objectives.ALWAYS, *row.needs)})
    parameters = {key: p.default for key, p in row.parameters.items()}
    assert isinstance(row.function(given, **parameters), Coefficients)
    for need in row.needs:
        with pytest.raises(
            AttributeError, match=f"statistic '{need}' was not computed: declare it"
        ):
            row.function(Statistics({k: v for k, v in given.items() if k != need}), **parameters)


def test_parse() -> None:
    objective = objectives.parse("target-sft,eta=0.25")
    assert objective.name == "target-sft" and objective.parameters == {"eta": 0.25}
    assert objectives.parse(" eaft , top_k = 7 , power=2e0 ").parameters == {
        "top_k": 7,
        "power": 2.0,
    }
    assert objectives.parse("gem").parameters == {"beta": 0.7}
    assert objectives.parse_parameters([]) == {}
    for text in ("target-sft,eta", "target-sft,eta=", "target-sft,eta=high", "target-sft,0.5"):
        pair = text.split(",")[1]
        with pytest.raises(
            ValueError, match=f"parameter '{pair}' must be written name=number, such as eta=0.5"
        ):
            objectives.parse(text)


def parsed_on_ranks(rank: int) -> tuple[Tensor, Tensor]:
    """Loss and gradient of an objective given as on a command line, on half of the vocabulary."""
    logits, teacher, labels = (x.clone() for x in parsed_problem())
    half = slice(rank * 5, (rank + 1) * 5)
    leaf = logits[..., half].clone().requires_grad_()
    objective = objectives.parse("target-sft,eta=0.5")
    out = q_target_cross_entropy(
        leaf, labels, objective, teacher=teacher[..., half], tp_group=dist.group.WORLD
    )
    out.loss.sum().backward()
    assert leaf.grad is not None
    return out.loss.detach(), leaf.grad


def parsed_problem() -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    logits, teacher = (torch.randn(4, 10, generator=g, dtype=torch.float64) for _ in range(2))
    return logits, teacher, torch.arange(4)


def test_parsed_objective_on_two_ranks() -> None:
    logits, teacher, labels = parsed_problem()
    leaf = logits.clone().requires_grad_()
    out = q_target_cross_entropy(
        leaf, labels, objectives.get("target-sft", eta=0.5), teacher=teacher
    )
    out.loss.sum().backward()
    per_rank = run_ranks(2, parsed_on_ranks)
    for loss, _ in per_rank:
        torch.testing.assert_close(loss, out.loss.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        torch.cat([grad for _, grad in per_rank], -1), leaf.grad, rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("kd-hybrid", "teacher_weight"),
        ("label-smoothing", "smoothing"),
        ("sft-kl", "kl_weight"),
        ("asft", "kl_weight"),
    ],
)
def test_a_weight_of_zero_is_still_a_residual(name: str, key: str) -> None:
    """A schedule that starts at 0 must not change the program: only a row whose residual is 0
    whatever its parameters are has none."""
    assert objectives.get(name, **{key: 0.0}).residual().exists
    assert not objectives.get("sft").residual().exists
    mixed = objectives.mixture(
        [objectives.get("sft"), objectives.get(name, **{key: 0.0})], torch.zeros(2).long()
    )
    assert mixed.residual().exists


def test_a_default_of_zero_is_still_a_residual() -> None:
    """Found when the row is registered, or where it makes plain numbers of its parameters, when
    they are known."""

    @objectives.register("off", source="us")
    def off(s: Statistics, *, weight: Annotated[float, Range(0)] = 0.0) -> Coefficients:
        return Coefficients(residual=weight)

    @objectives.register("number", source="us")
    def number(s: Statistics, *, weight: Annotated[float, Range(0)] = 0.0) -> Coefficients:
        return Coefficients(residual=float(weight))

    assert objectives.get("off").residual().exists
    assert not objectives.get("number").residual().exists
    assert objectives.get("number", weight=0.5).residual().exists


def test_how_an_objective_prints() -> None:
    assert repr(objectives.get("target-sft", eta=0.25)) == "target-sft, eta=0.25"
    assert repr(objectives.get("gem", beta=torch.ones(3))) == "gem, beta=tensor"
    mixed = objectives.mixture(
        [objectives.get("sft"), objectives.get("gem")], torch.zeros(2, dtype=torch.int64)
    )
    assert repr(mixed) == "sft | gem, beta=0.7"


# ---- errors of get


def test_unknown_name_and_parameter() -> None:
    with pytest.raises(
        ValueError,
        match=r"unknown objective 'sftt' \(did you mean 'sft'\?\); valid: sft, dft, .*, target-sft",
    ):
        objectives.get("sftt")
    with pytest.raises(ValueError, match="unknown objective ''; valid: sft"):
        objectives.parse("")
    with pytest.raises(
        ValueError, match="objective 'idft' has no parameter 'tau'; valid: threshold, temperature, "
    ):
        objectives.get("idft", tau=1)
    with pytest.raises(
        ValueError, match="objective 'kd' has no parameter 'beta'; valid: it has none"
    ):
        objectives.get("kd", beta=1)


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        (
            "target-sft",
            {"eta": 1.01},
            "target-sft: eta=1.01 is out of range: it must be from 0 to 1",
        ),
        ("target-sft", {"eta": -0.1}, "eta=-0.1 is out of range"),
        ("target-sft", {"eta": float("nan")}, "eta=nan is out of range"),
        ("gem", {"beta": 0.0}, "gem: beta=0 is out of range: it must be above 0"),
        ("gem", {"beta": float("inf")}, "gem: beta=inf is out of range"),
        ("gift", {"beta": -1}, "gift: beta=-1 is out of range: it must be at least 0"),
        ("eaft", {"top_k": 1}, "eaft: top_k=1 is out of range: it must be from 2 to 4096"),
        ("eaft", {"top_k": 5000}, "top_k=5000 is out of range"),
        (
            "idft",
            {"threshold": float("inf")},
            "idft: threshold=inf is out of range: it must be any finite number",
        ),
        ("idft", {"weight_min": 2.0}, "idft: weight_min=2 must not exceed weight_max=1"),
        ("iw-sft", {"clip_max": 1, "clip_min": 3}, "iw-sft: clip_min=3 must not exceed clip_max=1"),
        ("target-sft", {"eta": torch.tensor([0.5, 1.5])}, "eta=1.5 is out of range"),
        ("target-sft", {"eta": torch.tensor([-0.5, 0.5])}, "eta=-0.5 is out of range"),
        ("target-sft", {"eta": torch.tensor([0.5, torch.nan])}, "eta=nan is out of range"),
    ],
)
def test_out_of_range(name: str, parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        objectives.get(name, **parameters)


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        (
            "target-sft",
            {"eta": "0.5"},
            "target-sft: eta must be a number or a per-token tensor, not '0.5'",
        ),
        ("target-sft", {"eta": None}, "eta must be a number or a per-token tensor, not None"),
        ("target-sft", {"eta": True}, "eta must be a number or a per-token tensor, not True"),
        ("eaft", {"top_k": 2.5}, "eaft: top_k must be an integer, not 2.5"),
        ("eaft", {"top_k": float("inf")}, "eaft: top_k must be an integer, not inf"),
        ("eaft", {"top_k": float("nan")}, "eaft: top_k must be an integer, not nan"),
        (
            "eaft",
            {"top_k": torch.tensor(5)},
            "top_k decides shapes and must be an int, not a tensor",
        ),
    ],
)
def test_wrong_type(name: str, parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        objectives.get(name, **parameters)


def test_the_ends_of_a_range_are_allowed() -> None:
    for eta in (0, 1, 0.0, 1.0, torch.tensor([0.0, 1.0]), torch.zeros(0)):
        objectives.get("target-sft", eta=eta)
    objectives.get("eaft", top_k=20.0)
    objectives.get(
        "target-sft", eta=torch.zeros(3, device="meta")
    )  # not looked at: that would wait for the device
    assert str(Range(0, 5, above=True)) == "above 0 up to 5" and str(Range(high=3)) == "at most 3"


def test_mixture() -> None:
    sft, gem = objectives.get("sft"), objectives.get("gem")
    index = torch.tensor([0, 1, 1])
    assert isinstance(objectives.mixture([sft, gem], index), Mixture)
    with pytest.raises(ValueError, match="at least one objective"):
        objectives.mixture([], index)
    with pytest.raises(TypeError, match="mixture index must be int64, not torch.float32"):
        objectives.mixture([sft], index.float())
    with pytest.raises(ValueError, match=r"mixture index must lie in \[0, 2\), got 0..2"):
        objectives.mixture([sft, gem], torch.tensor([0, 2]))
    with pytest.raises(ValueError, match=r"got -1..0"):
        objectives.mixture([sft, gem], torch.tensor([0, -1]))


# ---- a user's own row


def half_dft(stats: Statistics, *, strength: Annotated[float, Range(0, 1)] = 0.5) -> Coefficients:
    """c_y = strength * p(y)"""
    return Coefficients(imitation=strength * stats.p_y)


def test_register_and_use() -> None:
    assert objectives.register("half-dft", source="us")(half_dft) is half_dft
    assert (
        objectives.names()[-1] == "half-dft"
        and objectives.row("half-dft").formula == "c_y = strength * p(y)"
    )
    logits, _, labels = parsed_problem()
    half, whole = (
        q_target_cross_entropy(logits, labels, objectives.parse(x)).loss
        for x in ("half-dft", "dft")
    )
    torch.testing.assert_close(half, whole / 2)
    with pytest.raises(
        ValueError, match="half-dft: strength=2 is out of range: it must be from 0 to 1"
    ):
        objectives.get("half-dft", strength=2)


def test_a_row_of_everything() -> None:
    """Every statistic is there, per token and finite, and what it gives back is used."""
    seen: dict[str, Tensor] = {}

    @objectives.register("all", source="us", needs=objectives.ON_DEMAND, teacher="required")
    def everything(s: Statistics, *, top_k: Count = 3) -> Coefficients:
        seen.update(s)
        return Coefficients(imitation=0.25, residual=0.75 * torch.ones_like(s.p_y), a=0.5, b=1.0)

    logits, teacher, labels = parsed_problem()
    out = q_target_cross_entropy(
        logits,
        labels,
        objectives.get("all"),
        teacher=teacher,
        sequence_ids=torch.zeros_like(labels),
        num_sequences=1,
    )
    for key in (*objectives.ALWAYS, *objectives.ON_DEMAND):
        assert seen[key].shape == labels.shape and torch.isfinite(seen[key]).all(), key
    log_p, log_t = (torch.log_softmax(x, -1) for x in (logits, teacher))
    at_y = torch.arange(4), labels
    torch.testing.assert_close(seen["teacher_logp_y"], log_t[at_y])
    torch.testing.assert_close(seen["reference_logp_y"], log_t[at_y])
    torch.testing.assert_close(seen["collision"], log_p.exp().square().sum(-1))
    pi = torch.softmax(0.5 * logits + log_t, -1)
    torch.testing.assert_close(out.loss, -0.25 * log_p[at_y] - 0.75 * (pi * log_p).sum(-1))
    assert (out.residual == 0.75).all()


def test_a_row_is_asked_on_the_device_of_the_logits() -> None:
    """Also before there are statistics, where a parameter is a tensor: a row that mixed devices
    would copy, and make the host wait. Numbers are asked once, when the objective is made."""
    seen: list[str] = []

    @objectives.register("where", source="us")
    def where(s: Statistics, *, level: float = 0.5) -> Coefficients:
        seen.extend(s[key].device.type for key in objectives.ALWAYS)
        return Coefficients(imitation=level * s.p_y)

    logits, _, labels = (x.to("meta") for x in parsed_problem())
    for level, calls in ((0.5, 1), (torch.ones(4, device="meta"), 2)):
        objective = objectives.get("where", level=level)
        seen.clear()
        q_target_cross_entropy(logits, labels, objectives.mixture([objective], labels))
        assert seen == ["meta"] * len(objectives.ALWAYS) * calls


def test_register_refuses() -> None:
    with pytest.raises(
        ValueError,
        match=r"objective 'sft' is registered already \(maximum likelihood\): choose another",
    ):
        objectives.register("sft", source="us")
    with pytest.raises(
        ValueError, match="'mine': unknown statistic 'entrpy'; known: entropy, collision, "
    ):
        objectives.register("mine", source="us", needs=("entrpy",))
    with pytest.raises(
        ValueError, match="'mine': teacher='maybe'; valid: none, optional, required"
    ):
        objectives.register("mine", source="us", teacher="maybe")  # type: ignore[arg-type]

    def no_default(stats: Statistics, *, strength: float) -> Coefficients:
        return Coefficients(imitation=strength)

    with pytest.raises(ValueError, match="'mine': parameter 'strength' needs a default"):
        objectives.register("mine", source="us")(no_default)

    def guided_by_a_statistic(stats: Statistics) -> Coefficients:
        return Coefficients(imitation=0.0, residual=1.0, a=stats.p_y)

    with pytest.raises(
        ValueError, match="'mine': a must depend on parameters only, not on statistics"
    ):
        objectives.register("mine", source="us")(guided_by_a_statistic)
    assert "mine" not in objectives.names()


PLUGIN = '''
"""A plugin whose function needs what the file imported."""
{future}
import math
from typing import Annotated

from megatron_tsft import objectives
from megatron_tsft.objectives import Coefficients, Range


@objectives.register("cosine", source="us", needs=("entropy",))
def cosine(stats, *, turns: Annotated[float, Range(0, 2)] = 1.0):
    """c_y = cos(pi * turns)^2"""
    return Coefficients(imitation=math.cos(math.pi * turns) ** 2 + 0 * stats.entropy)
'''


@pytest.mark.parametrize("future", ["", "from __future__ import annotations"])
def test_load_plugin(tmp_path: Path, future: str) -> None:
    file = tmp_path / "mine.py"
    file.write_text(PLUGIN.format(future=future))
    assert objectives.load_plugin(str(file)) == ["cosine"]
    gc.collect()
    logits, _, labels = parsed_problem()
    quarter, sft = (
        q_target_cross_entropy(logits, labels, objectives.parse(x))
        for x in ("cosine,turns=0.25", "sft")
    )
    torch.testing.assert_close(quarter.loss, sft.loss / 2)
    with pytest.raises(ValueError, match="cosine: turns=3 is out of range: it must be from 0 to 2"):
        objectives.get("cosine", turns=3)
    with pytest.raises(ValueError, match="'cosine' is registered already"):
        objectives.load_plugin(str(file))


def test_load_plugin_refuses(tmp_path: Path) -> None:
    empty = tmp_path / "empty.py"
    empty.write_text("x = 1\n")
    with pytest.raises(
        ValueError, match=r"plugin .*empty.py registered no objective: decorate a function"
    ):
        objectives.load_plugin(str(empty))
    with pytest.raises(FileNotFoundError):
        objectives.load_plugin(str(tmp_path / "missing.py"))
    broken = tmp_path / "broken.py"
    broken.write_text("1 / 0\n")
    with pytest.raises(ZeroDivisionError):
        objectives.load_plugin(str(broken))
