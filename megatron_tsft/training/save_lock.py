"""One run at a time in a save folder."""

import contextlib
from pathlib import Path

from megatron_tsft import console
from megatron_tsft.lock import STALE, Lock, hold_inside
from megatron_tsft.plan.command_line import CommandLine
from megatron_tsft.plan.meeting import Meeting


def lock_save_folder(
    line: CommandLine, meeting: Meeting, stack: contextlib.ExitStack
) -> Lock | None:
    """The save folder's lock on rank 0, before any rank looks at what is there; None on the others,
    and where nothing is saved. A run that is about to end (it was stopped, or its torchrun was
    killed) is waited for.

    Args:
        line: the command line.
        meeting: of its ranks.
        stack: gives the lock back.

    Raises:
        UserError: another run lives there, or the folder cannot be written.
    """
    save = line.given.get("save")
    locks: list[Lock] = []

    def take() -> None:
        # what is no folder is refused by the plan, with the reason
        if save and not line.config.check and (Path(save).is_dir() or not Path(save).exists()):
            held = hold_inside(Path(save), f"--save {save}", patience=STALE, say=console.say)
            locks.append(stack.enter_context(held))

    meeting.share(take)
    return next(iter(locks), None)
