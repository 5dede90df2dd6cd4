"""Objectives: the catalogue, how a row is written and registered, parameters, schedules."""

from megatron_tsft.objectives import catalogue  # its rows register themselves
from megatron_tsft.objectives.definition import (
    ALWAYS,
    ON_DEMAND,
    Coefficients,
    Count,
    NonNegative,
    Parameter,
    Positive,
    Range,
    Real,
    Residual,
    Row,
    Scalar,
    Statistics,
    TeacherUse,
    Unit,
)
from megatron_tsft.objectives.objective import Mixture, Objective, SingleObjective
from megatron_tsft.objectives.registry import (
    get,
    load_plugin,
    mixture,
    names,
    parse,
    parse_parameters,
    register,
    row,
)
from megatron_tsft.objectives.schedules import Schedule, parse_schedule
from megatron_tsft.objectives.tensors import as_like, log_expm1

__all__ = [
    "ALWAYS",
    "ON_DEMAND",
    "Coefficients",
    "Count",
    "Mixture",
    "NonNegative",
    "Objective",
    "Parameter",
    "Positive",
    "Range",
    "Real",
    "Residual",
    "Row",
    "Scalar",
    "Schedule",
    "SingleObjective",
    "Statistics",
    "TeacherUse",
    "Unit",
    "as_like",
    "catalogue",
    "get",
    "load_plugin",
    "log_expm1",
    "mixture",
    "names",
    "parse",
    "parse_parameters",
    "parse_schedule",
    "register",
    "row",
]
