"""dev/seeded_faults.py: each of its twenty faults can still be planted, and its likely tests are
there. Whether they notice is for the script itself to say."""

import ast
import shlex

import pytest

from dev.seeded_faults import FAULTS, REPOSITORY, Fault, find


def test_twenty_of_different_names() -> None:
    assert len({fault.name for fault in FAULTS}) == len(FAULTS) == 20


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_it_can_be_planted(fault: Fault) -> None:
    """The line is there once, and the file with the fault is still Python."""
    text = find(REPOSITORY, fault).read_text()
    planted = text.replace(fault.snippet, fault.replacement)
    assert ast.dump(ast.parse(planted)) != ast.dump(ast.parse(text))
    for arguments in fault.likely:
        assert (REPOSITORY / shlex.split(arguments)[0]).is_file(), arguments
