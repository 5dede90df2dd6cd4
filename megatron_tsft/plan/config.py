"""Every `--tsft-*` flag is a field of `TsftConfig`: the argparse group, its help and its docs table
come from here."""

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_tsft.checkpoint.manifest import HOW
from megatron_tsft.data.pieces import LONG_SAMPLES
from megatron_tsft.plan import teachers

TAILS = ("uniform", "drop")
DEVICES = ("cuda", "cpu")


def flag(default: Any, help: str, **options: Any) -> Any:
    """A field with what argparse needs to know; the flag's name follows from the field's."""
    return dataclasses.field(default=default, metadata={"help": help, **options})


@dataclass(frozen=True)
class TsftConfig:
    """What this package adds to Megatron's command line."""

    model: str = flag(
        "",
        "The folder that `convert_checkpoint.py import` made. It gives the architecture and the"
        " weights that the run starts from.",
        metavar="DIR",
    )
    data: Sequence[str] = flag(
        (),
        "The folders that `prepare_data.py` made, to train on. Of several, each may have its share"
        " of the packs and an objective of its own: a:0.7:target-sft,eta=0.5 b:0.3:sft",
        nargs="+",
        metavar="DIR[:SHARE[:OBJECTIVE]]",
    )
    eval_data: str = flag(
        "",
        "The prepared folder that every evaluation reads exactly once.",
        metavar="DIR",
    )
    objective: str = flag(
        "target-sft",
        "The objective, which decides each token's target. docs/objectives.md lists them.",
        metavar="NAME",
    )
    args: Sequence[str] = flag(
        (),
        "The objective's parameters, such as eta=0.5. A parameter may follow a schedule over the"
        " steps: eta=linear:0:0.5:1000 (constant, linear or cosine).",
        nargs="+",
        metavar="NAME=VALUE",
    )
    teacher: str = flag(
        "",
        "Where the teacher's predictions come from: reference asks the imported model of"
        " --tsft-model, frozen; model asks another one, of --tsft-teacher-load; cache reads what a"
        " model said once, from --tsft-teacher-cache. Without this flag the other teacher flags"
        " decide, else an objective that needs a teacher gets the reference.",
        choices=teachers.NAMES,
    )
    teacher_load: str = flag(
        "",
        "The imported folder of the model that is the teacher; it may have any depth and width.",
        metavar="DIR",
    )
    teacher_cache: Sequence[str] = flag(
        (), "The folders that `cache_teacher.py` made.", nargs="+", metavar="DIR"
    )
    teacher_tail: str = flag(
        "uniform",
        "What a cached teacher says of the tokens outside its top-k: uniform spreads their mass"
        " evenly over them, drop gives them nothing.",
        choices=TAILS,
    )
    teacher_token_map: str = flag(
        "",
        "A JSON list that says the teacher's id of each of the student's tokens, for a teacher of"
        " --tsft-teacher-load with another tokenizer.",
        metavar="FILE",
    )
    reference_refresh: int = flag(
        0,
        "The reference takes the student's weights every N steps.",
        type=int,
        metavar="N",
    )
    plugin: Sequence[str] = flag(
        (), "Python files that register objectives of your own.", nargs="+", metavar="FILE"
    )
    fuse_head: bool = flag(
        False,
        "The LM head is computed inside the loss, so that logits are never held whole.",
        action="store_true",
    )
    long_samples: str = flag(
        "refuse",
        "What happens to conversations that are longer than --seq-length. split is for plain text:"
        " every token is learnt, in pieces.",
        choices=LONG_SAMPLES,
    )
    document_multiple: int = flag(
        0,
        "Each conversation is padded to a multiple of N positions. By default it is what context"
        " parallelism asks for, twice its size, else 1. With the same N, runs of any layout read"
        " the same packs.",
        type=int,
        metavar="N",
    )
    verify: str = flag(
        HOW[0],
        "How checkpoints, imported models and teacher caches are compared with their checksums"
        " before they are used: every byte (the ranks share it), sizes, or nothing.",
        choices=HOW,
    )
    keep_last: int = flag(
        0,
        "Keep the newest N whole checkpoints of --save and delete older ones when a new one is"
        " complete. Without this flag all are kept.",
        type=int,
        metavar="N",
    )
    keep_every: int = flag(
        0,
        "With --tsft-keep-last, also keep the checkpoints of every K-th step.",
        type=int,
        metavar="K",
    )
    stop_at_spike: float = flag(
        0.0,
        "Stop, before it is saved, at a step whose negative log-likelihood is more than X times the"
        " median of the 20 steps before it. Without this flag no spike stops the run.",
        type=float,
        metavar="X",
    )
    trust: bool = flag(
        False,
        "Trust whoever wrote the folders: run a tokenizer's or model's own Python, read pickles of"
        " any class, follow links out of a folder.",
        action="store_true",
    )
    check: bool = flag(
        False,
        "Check everything that can be checked, print the plan and stop.",
        action="store_true",
    )
    verbose: bool = flag(
        False,
        "Print all that Megatron says, which otherwise goes to the log in the save folder.",
        action="store_true",
    )
    device: str = flag(
        "",
        "Where the run computes. By default it is cuda where there is a GPU, else cpu.",
        choices=DEVICES,
    )

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
