"""The demo's language modelling text."""

from __future__ import annotations

import json
from pathlib import Path

from alignkit.tools.demo.prose import paragraphs, write_prose


def test_tables_underlines_and_code_are_not_prose() -> None:
    """Of six blocks two are prose: one wrapped over lines, one short enough to be left out."""
    prose = "Sequences are finite ordered sets,\nindexed by non-negative numbers, and the built-in"
    topic = "\n\n".join(
        [
            "Sequence Types\n**************",
            prose,
            "   >>> [1, 2, 3][0]\n   1",
            "+-------+------+\n| a     | b    |",
            "Too short.",
            "| cell | another cell that is long enough to pass for a paragraph of prose, or so |",
        ]
    )
    assert paragraphs(topic) == [prose.replace("\n", " ")]


def test_the_splits_share_no_paragraph_and_are_reproducible(tmp_path: Path) -> None:
    write_prose(tmp_path / "a")
    write_prose(tmp_path / "b")
    found = {}
    for split in ("train", "test"):
        text = (tmp_path / "a" / f"{split}.jsonl").read_text(encoding="utf-8")
        assert text == (tmp_path / "b" / f"{split}.jsonl").read_text(encoding="utf-8")
        documents = [json.loads(line)["text"] for line in text.splitlines()]
        found[split] = [part for document in documents for part in document.split("\n\n")]
    assert not set(found["train"]) & set(found["test"])
    assert sum(map(len, found["train"])) > 100_000
    assert sum(map(len, found["test"])) > 10_000
    assert len(set(found["train"])) == len(found["train"])
