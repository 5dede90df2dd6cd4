"""What every command begins and ends with: the device, a process that is alone, and errors as one
line that comes last."""

import contextlib
import errno
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from megatron_tsft.errors import Interrupted, UserError
from megatron_tsft.trust import trusting

INTERRUPTED = 130  # as shells say it
# what a disk or a folder refuses: the user can mend it
USERS = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EFBIG}
USERS |= {errno.ENOENT, errno.EEXIST, errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG}
PATIENCE = 30  # seconds that other ranks leave to rank 0, which says what all of them met


def run_command(
    body: Callable[[], int], *, name: str = "", left: str = "", trust: bool = False
) -> int:
    """The exit status of `body`; 2 for what a user can mend, 130 for Ctrl-C, 1 for a defect.

    The last line on standard error says what was wrong; a defect has its traceback before it.

    Args:
        body: the command.
        name: what stopped, for messages about Ctrl-C and about the disk.
        left: what has become of the files then, such as "; nothing is left half-written".
        trust: whether the folders that are named are trusted with code.
    """
    try:
        with trusting(trust):
            return body()
    except UserError as error:
        everywhere = error.met_by_all or not (error.met_here_alone or _in_group())
        return report(str(error), everywhere=everywhere)
    except Interrupted as stop:
        text = str(stop) or f"{name} stopped by {signal.Signals(stop.number).name}{left}".strip()
        return report(text, status=128 + stop.number, silent=os.environ.get("RANK", "0") != "0")
    except KeyboardInterrupt:
        return report(f"{name} stopped: interrupted{left}".strip(), status=INTERRUPTED)
    except BrokenPipeError:  # nobody reads any more, as behind `| head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except OSError as error:
        if error.errno not in USERS:
            return defect(error)
        return report(f"{name} stopped: {error}{left}".strip())
    except Exception as error:
        return defect(error)


def defect(error: Exception) -> int:
    """Report what should not have happened."""
    traceback.print_exception(error, file=sys.stderr)
    text = " ".join(str(error).split())[:2000]
    return report(f"{type(error).__name__}: {text}" if text else type(error).__name__, status=1)


def report(message: str, *, everywhere: bool = False, status: int = 2, silent: bool = False) -> int:
    """Say an error on standard error and in torchrun's closing summary; returns `status`.

    Args:
        message: what was wrong.
        everywhere: every rank met it; rank 0 says it, and torchrun ends the others.
        status: of the process.
        silent: another rank says it, and this one only torchrun.
    """
    message = " ".join(message.split())
    rank, text = os.environ.get("RANK", "0"), f"error: {message}"
    if rank != "0" and not silent:
        if everywhere:
            time.sleep(PATIENCE)
        text = f"error (rank {rank}): {message}"
    if not silent:
        print(text, file=sys.stderr, flush=True)
    # torch/distributed/elastic/multiprocessing/errors
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        extra = {"py_callstack": text, "timestamp": str(int(time.time()))}
        content = {"message": {"message": text, "extraInfo": extra}}
        with contextlib.suppress(OSError):
            Path(file).write_text(json.dumps(content))
    return status


def _in_group() -> bool:
    """Whether the ranks have met: then this one may be the only one that knows."""
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_available() and distributed.is_initialized()


def choose_device(device: str, flag: str) -> str:
    """What to compute on, "cuda" or "cpu": what was asked for, else cuda where there is one.

    Args:
        device: "cuda", "cpu", or "" for any.
        flag: that sets it, for messages.

    Raises:
        UserError: there is no GPU.
    """
    if device != "cpu":
        import torch

        if torch.cuda.is_available():
            return "cuda"
        if device == "cuda":
            raise UserError(f"{flag} cuda: torch sees no GPU; pass {flag} cpu for a run on the CPU")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the CPU layer refuses to hide a GPU
    return "cpu"


def be_a_rank() -> None:
    """Without torchrun: be the one rank of a job of its own.

    Its store listens on port 0, which the kernel makes a free one: a port that was found free
    before may be another process's by then.
    """
    if "WORLD_SIZE" in os.environ:
        return
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    os.environ |= {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0"}


def megatron_environment() -> None:
    """What Megatron insists on: it overlaps communication by the order in which kernels start."""
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    os.environ["HF_HUB_OFFLINE"] = os.environ.get("HF_HUB_OFFLINE", "1")
