"""megatron-tsft: fine-tuning by target-distribution design (arXiv 2606.11189) for Megatron-Core."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_tsft import objectives
    from megatron_tsft.loss import (
        QTargetOutput,
        TeacherHidden,
        TeacherTopK,
        q_target_cross_entropy,
        q_target_linear_cross_entropy,
    )

__version__ = "0.1.0"
__all__ = [
    "QTargetOutput",
    "TeacherHidden",
    "TeacherTopK",
    "objectives",
    "q_target_cross_entropy",
    "q_target_linear_cross_entropy",
]


def __getattr__(name: str) -> Any:
    """A public name, imported when it is asked for: torch takes seconds, and a command's --help
    need not wait for it."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "objectives":
        return importlib.import_module("megatron_tsft.objectives")
    return getattr(importlib.import_module("megatron_tsft.loss"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
