"""What a failure of the machine means: a full disk, too few file descriptors, a rank that hangs."""

import errno
import re
import resource
import shutil
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_tsft.checkpoint.folder import read_metadata, whole_iterations
from megatron_tsft.errors import UserError
from megatron_tsft.plan.meeting import Meeting
from megatron_tsft.plan.plan import Plan

GOES_ON = "the same command goes on from the last checkpoint"
TIME_IS_UP = re.compile(r"[Tt]imed out|[Tt]imeout")
FILES = resource.RLIMIT_NOFILE
STATE_BYTES = 12  # of a parameter: fp32 weights and Adam's two moments


def explain(error: BaseException, plan: Plan, meeting: Meeting, step: int) -> UserError | None:
    """The line for a person; None for what is a defect.

    Args:
        error: that ended Megatron's loop.
        plan: of the run.
        meeting: of its ranks.
        step: that was made, from 1.
    """
    text = "".join(traceback.format_exception(error))
    found = {e.errno for e in _chain(error) if isinstance(e, OSError)}
    if told := _other_groups(error, plan):
        return UserError(told)  # on all ranks
    if (told := full_disk(plan, found, text, step)) is None:
        if found & {errno.EMFILE, errno.ENFILE} or "Too many open files" in text:
            told = (
                f"too many open files, the limit is {resource.getrlimit(FILES)[0]}: raise it"
                f" (ulimit -n 65536); {GOES_ON}"
            )
        elif "killed by signal: Bus error" in text:
            told = (
                "a worker of a data loader ended with SIGBUS: /dev/shm is full, or a file of the"
                f" data was cut while it was read; pass --num-workers 0, or mend it: {GOES_ON}"
            )
        elif TIME_IS_UP.search(str(error)):
            told = _hung(meeting, step)
    if told is None:
        return None
    explained = UserError(told)
    explained.met_here_alone = True
    return explained


def _other_groups(error: BaseException, plan: Plan) -> str:
    """The line where a checkpoint's parameter groups are not this run's: they are told apart by
    these (core/optimizer/optimizer.py)."""
    if not isinstance(error, ValueError) or "Could not find parameter group" not in str(error):
        return ""
    load = plan.start.folder
    return (
        f"{load} was trained with another --lr, --min-lr or weight decay: pass the same, or start"
        f" anew from its weights with --load {load} --finetune and another --save"
    )


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error, what caused it, and what torch's checkpoints wrap
    (torch/distributed/checkpoint/api.py, CheckpointException)."""
    todo, seen = [error], set[int]()
    while todo:
        found = todo.pop()
        if id(found) in seen:
            continue
        seen.add(id(found))
        yield found
        todo += [e for e in (found.__cause__, found.__context__) if e is not None]
        wrapped: Any = getattr(found, "failures", {})
        if isinstance(wrapped, dict):
            parts: list[Any] = [p[0] if isinstance(p, tuple) else p for p in wrapped.values()]
            todo += [part for part in parts if isinstance(part, BaseException)]


def full_disk(plan: Plan, numbers: set[int | None], text: str, step: int) -> str | None:
    """The line where a save did not fit; the writer of a checkpoint keeps no error number."""
    save = plan.flags.save
    if not save or not Path(save).is_dir():
        return None
    full = bool(numbers & {errno.ENOSPC, errno.EDQUOT}) or "No space left" in text
    if not full and "CheckpointException" not in text:
        return None
    free, needed = shutil.disk_usage(save).free, _checkpoint_bytes(plan, Path(save))
    if not full and free >= needed:
        return None
    return (
        f"no space left in {save}, for the checkpoint of step {step}: one needs"
        f" {_size(needed)}, {_size(free)} are free; make room, or pass"
        f" --tsft-keep-last 2; {GOES_ON}"
    )


def _size(count: int) -> str:
    """Bytes for a person."""
    return f"{count / 1e9:.3g} GB" if count >= 10**9 else f"{count / 1e6:.3g} MB"


def _checkpoint_bytes(plan: Plan, save: Path) -> int:
    """Of a checkpoint: the newest one's, else by its parameters."""
    for number in whole_iterations(save)[:1]:
        files = (save / f"iter_{number:07d}").iterdir()
        return sum(path.stat().st_size for path in files if path.is_file())
    tensors: Any = read_metadata(plan.start.base).state_dict_metadata.values()
    parameters = sum(t.size.numel() for t in tensors if hasattr(t, "size"))
    return parameters * (STATE_BYTES + 2 * (plan.flags.bf16 or plan.flags.fp16))


def _hung(meeting: Meeting, step: int) -> str:
    """The line for a collective that not all ranks came to."""
    absent = meeting.absent()
    if not absent:
        return (
            f"step {step}: a collective was not through in time, though every rank says so: the"
            f" network is slow, or a file system; raise --distributed-timeout-minutes. {GOES_ON}"
        )
    names = ", ".join(f"{rank} on {host}" for rank, host in absent.items())
    return (
        f"step {step}: rank {names} did not come to a collective within"
        f" --distributed-timeout-minutes, the others wait for it: it hangs or is very slow, look at"
        f" its processes and its log on that node; {GOES_ON}"
    )
