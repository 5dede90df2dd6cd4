"""Defects of the installed Megatron-Core, one file each: the reason, the upstream line, when it
applies, the repair.

Two other places replace names of Megatron's: checkpoint/megatron_model.py, while it compares a
conversion on a CPU, and cpu/, which makes a loop for GPUs run without one. `apply_all` applies what
the installation needs, on any device, and says what it did.
"""

from types import ModuleType

from megatron_tsft.upstream import (
    dataset_helpers,
    moe_norm_key,
    optimizer_resume,
    rope_factor,
    save_queue,
    sequence_parallel_norm,
    sgd_resume,
)

DEFECTS: tuple[ModuleType, ...] = (
    dataset_helpers,
    sequence_parallel_norm,
    optimizer_resume,
    rope_factor,
    moe_norm_key,
    sgd_resume,
)
SYNCHRONOUS_SAVES: tuple[ModuleType, ...] = (save_queue,)


def apply_all(*, asynchronous_saves: bool = False) -> list[str]:
    """Repair each defect that is present; returns the names of the files that applied. Safe to call
    twice.

    asynchronous_saves: the run uses --async-save, so what is wrong with synchronous saves alone
        stays.
    """
    applied = []
    for defect in DEFECTS if asynchronous_saves else DEFECTS + SYNCHRONOUS_SAVES:
        if defect.applies():
            defect.apply()
            applied.append(defect.__name__.rpartition(".")[2])
    return applied
