"""What the documents point to is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_names_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = set(
        re.findall(r"[`/(]((?:tests|benchmarks|docs|configs|notebooks)/[\w/.-]+\.\w+)", text)
    )
    named |= {f"docs/{link}" for link in re.findall(r"\]\((\w+\.md)", text) if page.parent != ROOT}
    missing = {name for name in named if not (ROOT / name).exists()}
    assert not missing


def test_modules_that_the_design_names_exist() -> None:
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:[a-z_]+/)+[a-z_]+\.py)`", text))
    missing = {n for n in named if not (ROOT / "alignkit" / n).exists() and not (ROOT / n).exists()}
    assert not missing
