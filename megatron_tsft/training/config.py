"""Every `--tsft-*` flag is a field of `TsftConfig`: the argparse group, its help and its docs table
come from here."""

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

TEACHERS = ("none", "reference", "model", "cache")
TAILS = ("uniform", "drop")
DEVICES = ("cuda", "cpu")
LONG_SAMPLES = ("refuse", "truncate")


def flag(default: Any, help: str, **options: Any) -> Any:
    """A field with what argparse needs to know; the flag's name follows from the field's."""
    return dataclasses.field(default=default, metadata={"help": help, **options})


@dataclass(frozen=True)
class TsftConfig:
    """What this package adds to Megatron's command line."""

    model: str = flag(
        "",
        "folder made by `convert_checkpoint.py import`: architecture, start weights",
        metavar="DIR",
    )
    data: Sequence[str] = flag(
        (),
        "folders made by `prepare_data.py` to train on; several with their share of the packs and,"
        " if not"
        " --tsft-objective, an objective: a:0.7:target-sft,eta=0.5 b:0.3:sft",
        nargs="+",
        metavar="DIR[:SHARE[:OBJECTIVE]]",
    )
    eval_data: str = flag(
        "", "prepared folder to evaluate on: one exact pass each time", metavar="DIR"
    )
    objective: str = flag(
        "target-sft", "what each token's target is; docs/objectives.md lists them", metavar="NAME"
    )
    args: Sequence[str] = flag(
        (),
        "the objective's parameters, such as eta=0.5, or on a schedule over steps:"
        " eta=linear:0:0.5:1000"
        " (constant, linear, cosine)",
        nargs="+",
        metavar="NAME=VALUE",
    )
    teacher: str = flag(
        "none",
        "the second distribution: reference is the frozen --tsft-model, model another one, cache"
        " what one said",
        choices=TEACHERS,
    )
    teacher_load: str = flag(
        "", "with --tsft-teacher model: its imported folder, of any depth and width", metavar="DIR"
    )
    teacher_cache: Sequence[str] = flag(
        (),
        "with --tsft-teacher cache: folders made by `cache_teacher.py`",
        nargs="+",
        metavar="DIR",
    )
    teacher_tail: str = flag(
        "uniform",
        "what a cache says of tokens outside its top-k: their mass spread evenly, or nothing",
        choices=TAILS,
    )
    teacher_token_map: str = flag(
        "",
        "with --tsft-teacher model of another tokenizer: JSON list, the teacher's id of each token",
        metavar="FILE",
    )
    reference_refresh: int = flag(
        0,
        "with --tsft-teacher reference: it takes the student's weights every N steps",
        type=int,
        metavar="N",
    )
    plugin: Sequence[str] = flag(
        (), "Python files that register objectives of your own", nargs="+", metavar="FILE"
    )
    fuse_head: bool = flag(
        False, "the LM head inside the loss: logits are never held whole", action="store_true"
    )
    long_samples: str = flag(
        "refuse", "conversations longer than --seq-length", choices=LONG_SAMPLES
    )
    document_multiple: int = flag(
        0,
        "pad each conversation to a multiple of N positions (default: what context parallelism"
        " asks, twice its size,"
        " else 1); with the same N runs of any layout read the same packs",
        type=int,
        metavar="N",
    )
    check: bool = flag(
        False, "check everything that can be checked, print the plan and stop", action="store_true"
    )
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
            option(field.name),
            dest=destination(field.name),
            default=field.default,
            help=text,
            **options,
        )
    return parser


def docs_table() -> str:
    """The flags as a Markdown table (docs/flags.md)."""
    lines = ["| flag | values | default | meaning |", "|---|---|---|---|"]
    for field in dataclasses.fields(TsftConfig):
        choices, nargs = field.metadata.get("choices"), field.metadata.get("nargs")
        values = (
            " ".join(f"`{c}`" for c in choices) if choices else field.metadata.get("metavar", "")
        )
        default = f"`{field.default}`" if isinstance(field.default, str) and field.default else ""
        lines.append(
            f"| `{option(field.name)}` | {values}{' ...' if nargs else ''} | {default} |"
            f" {field.metadata['help']} |"
        )
    return "\n".join(lines) + "\n"
