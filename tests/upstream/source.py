"""Do the lines that a defect's docstring names say what it claims, in the installed Megatron?"""

import importlib.util
import re
from pathlib import Path
from types import ModuleType


def check_lines(defect: ModuleType, lines: dict[tuple[str, int], str]) -> None:
    """(file below megatron/, line number) -> text of that line; the docstring names exactly these
    numbers."""
    spec = importlib.util.find_spec("megatron.core")
    assert spec is not None and spec.origin is not None
    root = Path(spec.origin).parents[1]
    for (file, number), text in lines.items():
        found = (root / file).read_text(encoding="utf-8").splitlines()[number - 1].strip()
        assert text in found, f"{file}:{number} is {found!r}, not {text!r}"
    assert defect.__doc__ is not None
    named = {
        int(digits)
        for digits in re.findall(r"(?:\.py:|[Ll]ine )(\d+)", defect.__doc__.replace("\n", " "))
    }
    assert named == {number for _, number in lines}
