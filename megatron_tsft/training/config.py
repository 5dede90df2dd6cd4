"""Every `--tsft-*` flag is a field of `TsftConfig`: the argparse group, its help and its docs table come from here."""

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

TEACHERS = ("none", "reference")
DEVICES = ("cuda", "cpu")
LONG_SAMPLES = ("refuse", "truncate")


def flag(default: Any, help: str, **options: Any) -> Any:
    """A field with what argparse needs to know; the flag's name follows from the field's."""
    return dataclasses.field(default=default, metadata={"help": help, **options})


@dataclass(frozen=True)
class TsftConfig:
    """What this package adds to Megatron's command line."""

    model: str = flag("", "folder made by `convert_checkpoint.py import`: architecture, start weights", metavar="DIR")
    data: str = flag("", "folder made by `prepare_data.py` to train on", metavar="DIR")
    eval_data: str = flag("", "prepared folder to evaluate on: one exact pass each time", metavar="DIR")
    objective: str = flag("target-sft", "what each token's target is; docs/objectives.md lists them", metavar="NAME")
    args: Sequence[str] = flag((), "the objective's parameters, such as eta=0.5", nargs="+", metavar="NAME=VALUE")
    teacher: str = flag("none", "the second distribution: reference is the frozen --tsft-model", choices=TEACHERS)
    plugin: Sequence[str] = flag((), "Python files that register objectives of your own", nargs="+", metavar="FILE")
    fuse_head: bool = flag(False, "the LM head inside the loss: logits are never held whole", action="store_true")
    long_samples: str = flag("refuse", "conversations longer than --seq-length", choices=LONG_SAMPLES)
    check: bool = flag(False, "check everything that can be checked, print the plan and stop", action="store_true")
    device: str = flag("", "default: cuda where there is one, else cpu", choices=DEVICES)

    @staticmethod
    def from_given(given: Mapping[str, Any]) -> "TsftConfig":
        """From the flags that were given, by destination; the rest is defaults."""
        names = {f.name: destination(f.name) for f in dataclasses.fields(TsftConfig)}
        return TsftConfig(**{name: given[key] for name, key in names.items() if key in given})


def destination(field: str) -> str:
    """The argparse destination of a field."""
    return f"tsft_{field}"


def option(field: str) -> str:
    """The flag of a field: eval_data -> --tsft-eval-data."""
    return "--" + destination(field).replace("_", "-")


def add_flags(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the group to a parser; returns the parser (Megatron's `extra_args_provider`)."""
    group = parser.add_argument_group("target-distribution design (megatron-tsft)")
    for field in dataclasses.fields(TsftConfig):
        options = dict(field.metadata)
        shown = field.default if isinstance(field.default, str) and field.default else None
        text = options.pop("help") + (f" (default: {shown})" if shown else "")
        group.add_argument(
            option(field.name), dest=destination(field.name), default=field.default, help=text, **options
        )
    return parser


def docs_table() -> str:
    """The flags as a Markdown table (docs/flags.md)."""
    lines = ["| flag | values | default | meaning |", "|---|---|---|---|"]
    for field in dataclasses.fields(TsftConfig):
        choices, nargs = field.metadata.get("choices"), field.metadata.get("nargs")
        values = " ".join(f"`{c}`" for c in choices) if choices else field.metadata.get("metavar", "")
        default = f"`{field.default}`" if isinstance(field.default, str) and field.default else ""
        lines.append(
            f"| `{option(field.name)}` | {values}{' ...' if nargs else ''} | {default} | {field.metadata['help']} |"
        )
    return "\n".join(lines) + "\n"
