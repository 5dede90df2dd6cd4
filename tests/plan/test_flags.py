"""The flags of Megatron's that we read have its names and its defaults."""

import dataclasses
import warnings

import pytest

from megatron_tsft.plan.flags import Flags


def test_names_and_defaults_are_the_installed_parsers() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron_tsft.training.read_flags import parser_of
    actions = {action.dest: action.default for action in parser_of()._actions}
    ours = {field.name: field.default for field in dataclasses.fields(Flags)}
    del ours["named"]
    assert ours == {name: actions[name] for name in ours}


def test_a_command_line_wins_over_our_defaults_and_these_over_megatrons() -> None:
    flags = Flags.of({"seed": 7, "micro_batch_size": 2}, {"seed": 5, "load": "a", "unread": 1})
    assert (flags.seed, flags.load, flags.micro_batch_size) == (7, "a", 2)
    assert flags.context_parallel_size == 1
    assert flags.named == {"seed", "micro_batch_size"}
    with pytest.raises(dataclasses.FrozenInstanceError):
        flags.seed = 1  # type: ignore[misc]
