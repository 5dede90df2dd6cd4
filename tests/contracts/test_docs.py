"""Pages say what is true: generated tables are current, links lead somewhere, code blocks run,
flags exist."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.training.matrix import CELLS, FUSED, MODELS

REPOSITORY = Path(__file__).resolve().parents[2]
PAGES = sorted([*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/*.md")])
SCRIPTS = sorted(
    path
    for path in (*REPOSITORY.glob("launch/**/*"), *REPOSITORY.glob("examples/**/*.sh"))
    if path.is_file()
)
MATRIX = REPOSITORY / "docs" / "benchmark" / "matrix.json"
TOOLS = sorted(
    path for room in ("tools", "benchmarks", "dev") for path in REPOSITORY.glob(f"{room}/*.py")
)


def blocks(page: Path, language: str) -> list[str]:
    """The fenced code blocks of a page in one language."""
    return re.findall(
        rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.M | re.S
    )


def test_generated_tables_are_current() -> None:
    spec = importlib.util.spec_from_file_location(
        "write_docs", REPOSITORY / "dev" / "write_docs.py"
    )
    assert spec is not None and spec.loader is not None
    write_docs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(write_docs)
    for name in write_docs.TABLES:
        path, now, fresh = write_docs.page(name)
        assert now == fresh, f"{path.name} is out of date: run dev/write_docs.py"


def test_the_matrix_shows_every_cell() -> None:
    """The figures are those of a run of the cells that there are now; TSFT_MATRIX=FILE writes
    them."""
    shown = [
        (row["cell"], row["flags"], row["ranks"])
        for row in json.loads(MATRIX.read_text(encoding="utf-8"))
    ]
    heads = (("", ""), (", fused head", f" {FUSED}"))
    cells = [
        (name + title, (of.flags + flag).strip(), of.ranks)
        for name, of in CELLS.items()
        for title, flag in heads
    ]
    assert shown == [(f"{model}, one rank", "", 1) for model in MODELS] + cells


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_run(page: Path) -> None:
    for block in blocks(page, "python"):
        done = subprocess.run(
            [sys.executable, "-c", block], cwd=REPOSITORY, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr


def test_json_rows_of_the_data_page_are_rows() -> None:
    rows = [
        json.loads(line)
        for block in blocks(REPOSITORY / "docs/data.md", "json")
        for line in block.splitlines()
    ]
    assert len(rows) >= 4
    assert all("messages" in row or {"prompt", "completion"} <= row.keys() for row in rows)


def test_every_flag_of_ours_that_is_named_exists() -> None:
    from megatron_tsft.plan.config import TsftConfig, option

    known = {option(name) for name in TsftConfig.__dataclass_fields__}
    for path in [
        *PAGES,
        *SCRIPTS,
        *TOOLS,
        *REPOSITORY.glob("examples/**/*.py"),
        *REPOSITORY.glob("megatron_tsft/**/*.py"),
    ]:
        for flag in set(re.findall(r"--tsft-[a-z-]*[a-z]", path.read_text(encoding="utf-8"))):
            assert flag in known, f"{path.name} names {flag}"
