"""Write English prose that every Python ships: the language reference behind ``help()``."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from pydoc_data.topics import topics

from alignkit.utils.atomic import write_atomically

_TEST_FRACTION = 0.1
_DOCUMENT_CHARS = 2000
_MIN_PARAGRAPH_CHARS = 80
# Tables, headings' underlines and code, which are left out.
_NOT_PROSE = re.compile(r"^(\+[-=]|\||[=*~^\-]{3,}|\s{3,}|>>>)", re.MULTILINE)


def write_prose(directory: Path, seed: int = 0) -> None:
    """Write ``train.jsonl`` and ``test.jsonl`` of ``{"text": …}`` documents.

    A document is consecutive paragraphs of one topic, about 2,000 characters. Topics quote one
    another, so every paragraph is kept once, and those of the test split first.

    Args:
        directory: The directory, made if needed; the two files are replaced.
        seed: Seed of the split and of the order of the topics.
    """
    names = sorted(topics)
    random.Random(seed).shuffle(names)
    total = sum(map(len, topics.values()))
    seen: set[str] = set()
    documents: dict[str, list[str]] = {"test": [], "train": []}
    taken = 0
    for name in names:
        split = "test" if taken < total * _TEST_FRACTION else "train"
        taken += len(topics[name])
        fresh = [text for text in paragraphs(topics[name]) if text not in seen]
        seen.update(fresh)
        documents[split] += _documents(fresh)
    for split, texts in documents.items():
        lines = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
        write_atomically(directory / f"{split}.jsonl", "".join(lines))


def paragraphs(topic: str) -> list[str]:
    """Return a topic's paragraphs of prose, each on one line; tables and code are left out."""
    blocks = (block for block in topic.split("\n\n") if not _NOT_PROSE.search(block))
    lines = (" ".join(block.split()) for block in blocks)
    return [line for line in lines if len(line) >= _MIN_PARAGRAPH_CHARS]


def _documents(texts: list[str]) -> list[str]:
    documents: list[str] = []
    for text in texts:
        if documents and len(documents[-1]) + len(text) < _DOCUMENT_CHARS:
            documents[-1] += "\n\n" + text
        else:
            documents.append(text)
    return documents
