"""Which Megatron Python would import: the one that was tested, and not another in the way of it.

`megatron` is a namespace package, so a folder of that name in the working directory (a checkout of
Megatron-LM, say) takes the place of the installed one without a word.
"""

import importlib.metadata
import importlib.util
import re
from pathlib import Path

from packaging.specifiers import SpecifierSet

from megatron_tsft.errors import UserError

TESTED = ">=0.19.2,<0.20"  # as in pyproject.toml


def check_megatron() -> None:
    """Raise UserError where Megatron is missing, of an untested version, or shadowed by an untested
    one. Nothing of it is imported."""
    try:
        spec = importlib.util.find_spec("megatron.core")
    except ModuleNotFoundError:
        spec = None
    if spec is None or spec.origin is None:
        raise UserError(
            f"megatron.core is not installed{_in_the_way()}: install megatron-tsft with its extra"
            " [train]"
        )
    place = Path(spec.origin).parent
    version = version_of(place)
    if SpecifierSet(TESTED).contains(version, prereleases=True):
        return
    installed = _installed()
    if installed is not None and installed.resolve() != place.resolve():
        raise UserError(
            f"megatron.core would come from {place}, version {version}, which stands before the"
            f" installed one in {installed}: start from another folder, or take {place.parents[1]}"
            f" out of PYTHONPATH (tested: {TESTED})"
        )
    raise UserError(
        f"megatron.core in {place} has version {version}: pip install 'megatron-core{TESTED}'"
    )


def _in_the_way() -> str:
    """Another module of that name, for messages; "" where there is none."""
    spec = importlib.util.find_spec("megatron")
    if spec is None or spec.origin is None:
        return ""
    return f" where Python looks first: {spec.origin} stands before it, move it away or"


def version_of(package: Path) -> str:
    """What package_info.py says, read as text; "0" where it says nothing."""
    file = package / "package_info.py"
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    numbers = [re.search(rf"^{name} = (\d+)", text, re.M) for name in ("MAJOR", "MINOR", "PATCH")]
    return ".".join(number[1] for number in numbers if number) or "0"


def _installed() -> Path | None:
    """Where the installed distribution has its package; None where none is installed."""
    try:
        distribution = importlib.metadata.distribution("megatron-core")
    except importlib.metadata.PackageNotFoundError:
        return None
    return Path(str(distribution.locate_file("megatron/core")))
