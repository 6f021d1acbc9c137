"""The rows that docs/data.md shows are read as it says."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from alignkit.data import PreferenceDataModule, SFTDataModule, TextDataModule
from alignkit.data.text.known_shapes import PREFERENCE, SFT
from alignkit.data.text.recognise import document_of
from alignkit.data.text.shapes import preference_sides, sft_sides
from alignkit.tools.audit.command import audit
from tests.data.conftest import write_jsonl

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
BLOCKS = re.findall(
    r'^```{\.jsonl title="(\w+): ([^"\n]+)"}\n(.*?)^```$', PAGE, re.DOTALL | re.MULTILINE
)


@pytest.mark.parametrize(("kind", "shape", "lines"), BLOCKS, ids=[each[1] for each in BLOCKS])
def test_the_rows_are_read_as_the_page_says(
    make: Callable[..., Any], tmp_path: Path, kind: str, shape: str, lines: str
) -> None:
    rows = [json.loads(line) for line in lines.splitlines()]
    assert len(rows) == 2
    for row in rows:
        if kind == "text":
            assert document_of(row)
            continue
        for side in (preference_sides if kind == "preference" else sft_sides)(row):
            assert side.shape == shape
            assert side.answer.strip() in ("4", "5", "About 4", "Fig.", "Oak.")
            asked = {"4": "2 + 2", "5": "2 + 2", "About 4": "2 + 2"}.get(
                side.answer.strip(), "fruit"
            )
            assert asked in side.prompt or "Add the numbers.\n2 and 2" in side.prompt
            assert side.trained == (row.get("label", True) in (True, "yes"))
    path = write_jsonl(tmp_path / "a.jsonl", rows * 9)
    report = audit(str(path))
    assert (report["kind"], report["bad_rows"]) == (kind, 0)
    modules = {"sft": SFTDataModule, "preference": PreferenceDataModule, "text": TextDataModule}
    options = {"block_size": 16} if kind == "text" else {}
    data = make(modules[kind], path, **options)
    data.setup()
    assert data.stats["rows"] == 18 and data.stats["examples"] >= 9


def test_no_shape_is_missing_from_the_page() -> None:
    shown = {shape for _, shape, _ in BLOCKS}
    left = {shape.name for shape in (*PREFERENCE, *SFT)} - shown
    assert left <= {"KTO messages", "prompts with responses", "prompts with answers",
                    "questions with responses", "questions with calls of tools"}  # fmt: skip
