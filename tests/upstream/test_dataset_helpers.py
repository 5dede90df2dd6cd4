"""Start-up of the wheel runs make without a Makefile; with the repair it goes on."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from megatron_tsft.upstream import dataset_helpers
from tests.fresh import fresh
from tests.upstream.source import check_lines


def start_twice() -> dict[str, Any]:
    """What `megatron.training.initialize` does to the helpers, before and after the repair."""

    def compile_as_start_up_does() -> object:
        from megatron.core.datasets.utils import compile_helpers

        try:
            compile_helpers()
        except SystemExit as error:
            return error.code
        return "went on"

    result: dict[str, Any] = {
        "applies": [dataset_helpers.applies()],
        "start": [compile_as_start_up_does()],
    }
    dataset_helpers.apply()
    result["applies"].append(dataset_helpers.applies())
    result["start"].append(compile_as_start_up_does())
    from megatron.core.datasets import helpers_cpp  # pyright: ignore[reportAttributeAccessIssue]

    result["helper"] = hasattr(helpers_cpp, "build_sample_idx_int32")
    return result


def test_rank_0_leaves_without_a_makefile_and_goes_on_with_the_repair() -> None:
    result = fresh(start_twice)
    assert result["applies"] == [True, False]
    assert result["start"] == [1, "went on"]
    assert result["helper"]  # nothing had to be compiled


def test_a_makefile_or_a_missing_helper_is_left_to_megatron(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import megatron.core.datasets.utils as utils

    monkeypatch.setattr(utils, "compile_helpers", lambda: None)
    assert dataset_helpers.applies()
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: None)
        assert not dataset_helpers.applies()
    (tmp_path / "Makefile").touch()
    monkeypatch.setattr(utils, "__file__", str(tmp_path / "utils.py"))
    assert not dataset_helpers.applies()


def test_the_docstring_names_the_right_lines() -> None:
    lines = {
        ("training/initialize.py", 178): "compile_helpers()",
        ("core/datasets/utils.py", 20): "def compile_helpers():",
    }
    check_lines(dataset_helpers, lines)
