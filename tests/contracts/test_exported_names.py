"""The public face: which names there are, and what the two losses are called with."""

import inspect
import typing
from pathlib import Path

import pytest

import megatron_tsft
from megatron_tsft import loss, objectives
from megatron_tsft.loss import LossOptions

PACKAGE = [
    "QTargetOutput",
    "TeacherHidden",
    "TeacherTopK",
    "objectives",
    "q_target_cross_entropy",
    "q_target_linear_cross_entropy",
]
LOSS = [
    "LossOptions",
    "QTargetOutput",
    "TeacherHidden",
    "TeacherRecords",
    "TeacherTopK",
    "q_target_cross_entropy",
    "q_target_linear_cross_entropy",
]
OBJECTIVES = [
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
# in their order, with their defaults
SHARED = {
    "reference_logprobs": None,
    "token_weights": None,
    "sequence_ids": None,
    "num_sequences": None,
    "logit_scale": 1.0,
    "diagnostics": (),
    "tp_group": None,
    "cp_group": None,
    "vocab_size": None,
    "ignore_index": -100,
}
NEEDED = inspect.Parameter.empty
ON_LOGITS = {
    "logits": NEEDED,
    "labels": NEEDED,
    "objective": NEEDED,
    "teacher": None,
    **SHARED,
    "inplace": False,
}
ON_HIDDEN = {
    "hidden": NEEDED,
    "weight": NEEDED,
    "labels": NEEDED,
    "objective": NEEDED,
    "teacher": None,
    **SHARED,
    "sequence_parallel": False,
}


@pytest.mark.parametrize(
    ("module", "names"),
    [(megatron_tsft, PACKAGE), (loss, LOSS), (objectives, OBJECTIVES)],
    ids=["megatron_tsft", "loss", "objectives"],
)
def test_exported_names(module: typing.Any, names: list[str]) -> None:
    assert module.__all__ == names
    assert all(hasattr(module, name) for name in names)


@pytest.mark.parametrize(
    ("function", "parameters"),
    [
        (megatron_tsft.q_target_cross_entropy, ON_LOGITS),
        (megatron_tsft.q_target_linear_cross_entropy, ON_HIDDEN),
    ],
    ids=["logits", "hidden"],
)
def test_signatures(function: typing.Any, parameters: dict[str, object]) -> None:
    signature = inspect.signature(function)
    assert {key: p.default for key, p in signature.parameters.items()} == parameters
    assert list(signature.parameters) == list(parameters)
    kinds = {p.kind for p in signature.parameters.values()}
    assert kinds == {inspect.Parameter.POSITIONAL_OR_KEYWORD}


def test_the_shared_options_are_those_of_both_signatures() -> None:
    options = typing.get_type_hints(LossOptions)
    assert list(options) == list(SHARED) and not LossOptions.__required_keys__
    for function in (
        megatron_tsft.q_target_cross_entropy,
        megatron_tsft.q_target_linear_cross_entropy,
    ):
        hints = typing.get_type_hints(function)
        assert {key: hints[key] for key in SHARED} == options


def test_the_package_is_typed() -> None:
    assert (Path(megatron_tsft.__file__).parent / "py.typed").is_file()
