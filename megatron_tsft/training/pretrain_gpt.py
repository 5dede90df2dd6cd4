"""Fine-tune a GPT model by target-distribution design, in Megatron's own loop. Start it with
torchrun:

    torchrun --nproc-per-node 2 -m megatron_tsft.training.pretrain_gpt --tensor-model-parallel-size
    2 \\
        --tsft-model base --tsft-data data/train --tsft-eval-data data/heldout \\
        --tsft-objective target-sft --tsft-args eta=0.5 --tsft-teacher reference \\
        --seq-length 4096 --micro-batch-size 1 --global-batch-size 32 --train-iters 1000 \\
        --lr 1e-5 --min-lr 1e-6 --lr-decay-style cosine --bf16 --save runs/a

launch/pretrain_gpt_tsft.sh puts such a command together. Started again with the same --save, a run
resumes.
"""

import argparse
import gc
import json
import os
import sys
import time
from pathlib import Path

from megatron_tsft.errors import UserError
from megatron_tsft.training.config import DEVICES, add_flags


def choose_device(argv: list[str]) -> str:
    """--tsft-device, or cuda where there is one."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--tsft-device", choices=DEVICES, default="")
    wanted = parser.parse_known_args(argv)[0].tsft_device
    if wanted != "cpu":
        import torch

        if torch.cuda.is_available():
            return "cuda"
        if wanted == "cuda":
            raise UserError(
                "--tsft-device cuda: torch sees no GPU; pass --tsft-device cpu for a run on the CPU"
            )
    os.environ["CUDA_VISIBLE_DEVICES"] = (
        ""  # the CPU layer refuses to hide a GPU that could be used
    )
    return "cpu"


def print_help() -> None:
    """Our flags; Megatron's are too many to repeat."""
    parser = argparse.ArgumentParser(
        prog="python -m megatron_tsft.training.pretrain_gpt",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Every flag of Megatron-LM's is accepted too, unless refused by name:"
        " --help-megatron lists them.",
    )
    add_flags(parser).print_help()


def main(argv: list[str] | None = None) -> int:
    """Run; the exit status is 2 for what the user can fix."""
    argv = sys.argv[1:] if argv is None else argv
    if "--help" in argv or "-h" in argv:
        print_help()
        return 0
    # Megatron overlaps communication by the order in which kernels are launched, and insists on
    # this
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    # looking through a million objects of imported modules takes a tenth of the start; run()
    # enables it for the steps
    gc.disable()
    try:
        device = choose_device(argv)
        if device == "cpu":
            from megatron_tsft.cpu import install

            install()
        if "--help-megatron" in argv:
            from megatron_tsft.training import arguments

            arguments.print_help()
            return 0
        from megatron_tsft.training.run import run

        run(argv, device)
    except UserError as error:
        return say(error)
    finally:
        gc.enable()
    return 0


def say(error: UserError) -> int:
    """Say it once, on standard error and in torchrun's closing summary; returns the exit status."""
    import torch.distributed as dist

    rank, text = os.environ.get("RANK", "0"), f"error: {error}"
    if rank != "0":
        # most errors meet every rank: rank 0 speaks, and torchrun ends this one; what this rank
        # alone met, it says
        if not dist.is_initialized() and not error.met_here_alone:
            time.sleep(30)
        text = f"error (rank {rank}): {error}"
    print(text, file=sys.stderr, flush=True)
    if file := os.environ.get(
        "TORCHELASTIC_ERROR_FILE"
    ):  # torch/distributed/elastic/multiprocessing/errors
        extra = {"py_callstack": text, "timestamp": str(int(time.time()))}
        Path(file).write_text(json.dumps({"message": {"message": text, "extraInfo": extra}}))
    return 2


if __name__ == "__main__":
    sys.exit(main())
