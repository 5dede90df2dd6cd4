"""Convert a model between a Hugging Face folder and a Megatron checkpoint folder, or check that
both are the same."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_tsft import trust
from megatron_tsft.checkpoint.manifest import HOW
from megatron_tsft.entry import run_command

if TYPE_CHECKING:
    from megatron_tsft.checkpoint.verify import Verification

EXAMPLE = """examples:
  tools/convert_checkpoint.py import --hf SmolLM2-135M-Instruct --megatron base --verify
  tools/convert_checkpoint.py export --megatron runs/my_run --hf my_model --dtype bf16
  tools/convert_checkpoint.py verify --hf SmolLM2-135M-Instruct --megatron base --text README.md
"""


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; see EXAMPLE."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLE, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name, help=text, description=text, epilog=EXAMPLE, formatter_class=raw
        )
        sub.add_argument("--hf", required=True, metavar="DIR", help="the Hugging Face folder")
        sub.add_argument(
            "--megatron", required=True, metavar="DIR", help="the Megatron checkpoint folder"
        )
        sub.add_argument("--no-progress", action="store_true", help="show no progress bar")
        trust.add_flag(sub)
        return sub

    importer = command(
        "import", "Hugging Face safetensors -> Megatron torch_dist, with its model card"
    )
    importer.add_argument(
        "--overwrite", action="store_true", help="replace a folder that an import made"
    )
    importer.add_argument(
        "--verify",
        action="store_true",
        help="then read the result back and compare it as `verify` does",
    )
    exporter = command(
        "export", "Megatron torch_dist (imported, or saved by a training run) -> Hugging Face"
    )
    exporter.add_argument(
        "--iteration",
        type=int,
        metavar="N",
        help="the iteration of the checkpoint (default: the latest)",
    )
    exporter.add_argument(
        "--dtype",
        choices=("bf16", "fp16", "fp32"),
        help="the type of the weights that are written (default: that of the original weights)",
    )
    exporter.add_argument(
        "--overwrite",
        action="store_true",
        help="replace a Hugging Face folder and everything in it",
    )
    checker = command(
        "verify", "compare every tensor bit by bit, the logits of both models and their tokenizers"
    )
    checker.add_argument(
        "--iteration",
        type=int,
        metavar="N",
        help="the iteration of the checkpoint (default: the latest)",
    )
    for sub in (exporter, checker):
        sub.add_argument(
            "--verify-files",
            choices=HOW,
            default=HOW[0],
            help="compare the checkpoint's files with their checksums first: every byte, sizes, or"
            " nothing (default: %(default)s)",
        )
    for sub, when in ((importer, "with --verify: "), (checker, "")):
        sub.add_argument(
            "--text",
            metavar="FILE",
            help=f"{when}compare logits on the first 1024 tokens of this file, in fp32 on the CPU"
            " (default: a short text of our own)",
        )
        sub.add_argument(
            "--weights-only",
            action="store_true",
            help=f"{when}compare weights, config and tokenizer, and no logits",
        )
    args = parser.parse_args(argv)
    text, only = getattr(args, "text", None), getattr(args, "weights_only", False)
    if (text or only) and not getattr(args, "verify", True):
        parser.error("--text and --weights-only belong to --verify: pass it, too")
    if text and only:
        parser.error("--text is for logits: pass it without --weights-only")
    if text and not Path(text).is_file():
        parser.error(f"--text {text} does not exist: name a text file")
    return args


def report(result: "Verification") -> int:
    """Print what differs and one line of summary; 0 where everything agrees, else 1."""
    for name in result.different[:10]:
        print(f"different: {name}")
    if result.logits is not None and not result.passed:
        for layer, worst in enumerate(result.logits.layers, 1):
            print(f"layer {layer}: outputs differ by {worst:.1e} of the largest")
    print(result.summary)
    return 0 if result.passed else 1


def run(args: argparse.Namespace) -> int:
    """One of the three commands; 0, or 1 where a verification finds a difference."""
    # after parsing: torch and what it brings take seconds, which --help need not wait for
    from megatron_tsft.checkpoint.convert import export_hf, import_hf
    from megatron_tsft.checkpoint.verify import verify

    bar, overwrite = not args.no_progress, getattr(args, "overwrite", False)
    if args.command == "import":
        card = import_hf(args.hf, args.megatron, overwrite=overwrite, progress=bar)
        print(
            f"wrote {args.megatron}: {card.architecture}, {card.megatron_arguments['num_layers']}"
            f" layers, {card.dtype}, vocabulary {card.vocab_size} padded to"
            f" {card.padded_vocab_size}, weights {card.source_hash}"
        )
        if not args.verify:
            return 0
    elif args.command == "export":
        done = export_hf(
            args.megatron,
            args.hf,
            iteration=args.iteration,
            dtype=args.dtype,
            overwrite=overwrite,
            progress=bar,
            verify_files=args.verify_files,
        )
        print(
            f"wrote {args.hf} from {done.checkpoint}: {done.tensors} tensors,"
            f" {done.bytes / 1e9:.3f} GB of {done.dtype} in {done.files} file(s)"
        )
        return 0
    return report(
        verify(
            args.hf,
            args.megatron,
            args.text,
            iteration=getattr(args, "iteration", None),
            weights_only=args.weights_only,
            progress=bar,
            verify_files=getattr(args, "verify_files", "none"),  # what was just written is read
        )
    )


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns 0, 1 where a verification finds a difference, 2 for user errors."""
    args = parse(argv)
    left = "" if args.command == "verify" else "; nothing is left half-written"
    return run_command(lambda: run(args), name=args.command, left=left, trust=args.trust)
