"""Fine-tune a GPT model by target-distribution design, in Megatron's own loop. Start it with
torchrun:

    torchrun --nproc-per-node 2 -m megatron_tsft.training.pretrain_gpt \\
        --tensor-model-parallel-size 2 \\
        --tsft-model base --tsft-data data/train --tsft-eval-data data/heldout \\
        --tsft-objective target-sft --tsft-args eta=0.5 --tsft-teacher reference \\
        --seq-length 4096 --micro-batch-size 1 --global-batch-size 32 --train-iters 1000 \\
        --lr 1e-5 --min-lr 1e-6 --lr-decay-style cosine --bf16 --save runs/a

Without torchrun it is one process. launch/pretrain_gpt_tsft.sh puts such a command together.
Started again with the same --save, a run resumes.
"""

import argparse
import gc
import sys

from megatron_tsft import console, entry
from megatron_tsft.errors import UserError
from megatron_tsft.plan.config import DEVICES, add_flags
from megatron_tsft.trust import trusting
from megatron_tsft.upstream.installed import check_megatron


def before_parsing(argv: list[str]) -> argparse.Namespace:
    """--tsft-device, --tsft-trust and --tsft-verbose, which are needed before Megatron's parser can
    be had."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--tsft-device", choices=DEVICES, default="")
    parser.add_argument("--tsft-trust", action="store_true")
    parser.add_argument("--tsft-verbose", action="store_true")
    return parser.parse_known_args(argv)[0]


def print_help() -> None:
    """Our flags; Megatron's are too many to repeat."""
    parser = argparse.ArgumentParser(
        prog="python -m megatron_tsft.training.pretrain_gpt",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Every flag of Megatron-LM's is accepted too, unless it is refused by name:"
        " --help-megatron lists them.",
    )
    add_flags(parser).print_help()


def train(argv: list[str]) -> int:
    """Run on the device that was asked for."""
    entry.be_a_rank()
    entry.megatron_environment()
    early = before_parsing(argv)
    device = entry.choose_device(early.tsft_device, "--tsft-device")
    check_megatron()
    verbose = early.tsft_verbose or "--help-megatron" in argv
    with console.quiet(verbose), trusting(early.tsft_trust):
        if device == "cpu":
            from megatron_tsft.cpu import install

            install()
        if "--help-megatron" in argv:
            from megatron_tsft.training.read_flags import print_help

            print_help()
            return 0
        from megatron_tsft.training.run import run

        try:
            run(argv, device)
        except UserError:
            raise
        except SystemExit as stop:
            if stop.code is not None:  # Megatron's regular ends have a number
                raise
            raise UserError(f"Megatron stopped the run: {console.last_words()}") from stop
        except Exception as error:
            if log := console.log_path():
                error.add_note(f"all that was printed before: {log}")
            raise
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run; the exit status is 2 for what the user can fix."""
    argv = sys.argv[1:] if argv is None else argv
    if "--help" in argv or "-h" in argv:
        print_help()
        return 0
    # looking through a million objects of imported modules takes a tenth of the start; the run
    # enables it for the steps
    gc.disable()
    try:
        return entry.run_command(lambda: train(argv), name="the run")
    finally:
        gc.enable()


if __name__ == "__main__":
    sys.exit(main())
