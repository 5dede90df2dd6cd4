"""The wheel has the built dataset helper but no Makefile, and start-up runs make: rank 0 exits with
1.

Upstream: megatron/training/initialize.py:178 calls megatron/core/datasets/utils.py:20
    `compile_helpers` (0.19.2).
Applies: any device, where the Makefile is missing and the built helper is there.
"""

import importlib.util
from pathlib import Path


def applies() -> bool:
    """No Makefile beside the helper, the helper is there, and the function is not ours yet."""
    import megatron.core.datasets.utils as utils

    makefile = Path(utils.__file__).with_name("Makefile")
    built = importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is not None
    return built and not makefile.exists() and utils.compile_helpers.__module__ != __name__


def apply() -> None:
    """compile_helpers becomes what it should be here: nothing to do."""
    import megatron.core.datasets.utils as utils

    def compile_helpers() -> None:
        """The helper is built already."""

    utils.compile_helpers = compile_helpers
