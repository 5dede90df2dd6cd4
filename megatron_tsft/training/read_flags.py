"""Reads a command line with Megatron's own parser, which knows some 900 flags, and with our
group."""

import argparse
from collections.abc import Sequence
from typing import NoReturn

from megatron.training.arguments import add_megatron_arguments

from megatron_tsft.errors import UserError
from megatron_tsft.names import did_you_mean
from megatron_tsft.plan.command_line import CommandLine, Ranks
from megatron_tsft.plan.config import TsftConfig, add_flags

HELP = "--help lists our flags, --help-megatron Megatron's"


class _Parser(argparse.ArgumentParser):
    """One line for a wrong flag, where argparse would print the usage of all flags first."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; {HELP}")


def parser_of() -> argparse.ArgumentParser:
    """Megatron's parser with our group."""
    return add_flags(add_megatron_arguments(_Parser(allow_abbrev=False)))


def print_help() -> None:
    """Megatron's flags and ours. Some of Megatron's help texts hold a bare "%", which argparse
    cannot format."""
    parser = parser_of()
    for action in parser._actions:
        values = vars(action) | {"prog": parser.prog, "type": "", "choices": ""}
        try:
            _ = (action.help or "") % values
        except (ValueError, TypeError, KeyError):
            action.help = (action.help or "").replace("%", "%%")
    parser.print_help()


def read_flags(argv: Sequence[str]) -> CommandLine:
    """What is on the command line; defaults are left out.

    Raises:
        UserError: an unknown flag, or a value that is none for its flag.
    """
    parser = parser_of()
    options = {a.dest: a.option_strings[0] for a in reversed(parser._actions) if a.option_strings}
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    parser._defaults.clear()
    namespace, unknown = parser.parse_known_args(list(argv))
    if unknown:
        known = [text for action in parser._actions for text in action.option_strings]
        close = next((did_you_mean(word.split("=")[0], known) for word in unknown), "")
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{close}")
    given = vars(namespace)
    config = TsftConfig.from_given(given)
    return CommandLine(tuple(argv), given, options, config, Ranks.of_environment())
