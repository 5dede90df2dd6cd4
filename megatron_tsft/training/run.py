"""A run from its command line to its last checkpoint: plan, start Megatron, hand over."""

from collections.abc import Sequence

from megatron_tsft import console
from megatron_tsft.plan.plan import make_plan
from megatron_tsft.training.hand_over import hand_over
from megatron_tsft.training.read_flags import read_flags
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
    plan = make_plan(read_flags(argv), device)
    args = start(plan.startup)
    config = student_config(plan, args)
    if plan.line.ranks.rank == 0:
        console.say(*plan.lines())
        if plan.config.check:
            console.say("everything fits; nothing was started (--tsft-check)")
    if not plan.config.check:
        hand_over(args, config, plan)
