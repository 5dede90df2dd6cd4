"""A run from its command line to its last checkpoint: plan, start Megatron, hand over."""

import contextlib
from collections.abc import Sequence

from megatron_tsft import console
from megatron_tsft.plan.meeting import Meeting, meet
from megatron_tsft.plan.plan import make_plan
from megatron_tsft.plan.same_run import changes
from megatron_tsft.training.hand_over import hand_over
from megatron_tsft.training.read_flags import read_flags
from megatron_tsft.training.save_lock import lock_save_folder
from megatron_tsft.training.start import start
from megatron_tsft.training.student import student_config


def run(argv: Sequence[str], device: str) -> None:
    """Train, evaluate, save, as the flags say.

    Args:
        argv: Megatron's flags and ours.
        device: "cuda" or "cpu" (the CPU layer is installed already).

    Raises:
        UserError: something does not fit; nothing has been trained then, and nothing written unless
            Megatron found it while it loaded the checkpoint.
    """
    line = read_flags(argv)
    # what only checks decides nothing together, and its other ranks need not be there
    meeting = Meeting() if line.config.check else meet(line.ranks)
    with contextlib.ExitStack() as stack:
        lock = lock_save_folder(line, meeting, stack)
        plan = make_plan(line, device, None if line.config.check else meeting)
        args = start(plan.startup)
        config = student_config(plan, args)
        if line.ranks.rank == 0:
            console.say(*plan.lines())
            resumed = plan.start.resumed
            if resumed is not None and (text := changes(resumed.before, vars(args))):
                console.say(f"another than in {resumed.checkpoint}: {text}")
            if plan.config.check:
                console.say("everything fits; nothing was started (--tsft-check)")
        if not plan.config.check:
            hand_over(args, config, plan, meeting, lock)
