"""The kinds of teacher that there are; a new one is a file beside this one, and its name here."""

import functools
import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_tsft.plan.teachers.definition import Kind

NAMES = ("none", "reference", "model", "cache")


@functools.cache
def kinds() -> "dict[str, Kind]":
    """Every kind by its name. They are imported here: `--help` needs the names alone."""
    modules = {name: importlib.import_module(f"{__name__}.{name}") for name in NAMES}
    return {name: module.KIND for name, module in modules.items()}
