"""Rows of documents against their tokens."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from alignkit.data import Policies
from alignkit.data.encode import packing
from alignkit.data.encode.documents import DocumentEncoder
from alignkit.data.encode.packing import rows
from alignkit.data.read.rows import Source
from alignkit.data.text.policies import Tally
from alignkit.errors import AlignkitError

DOCUMENTS = st.lists(st.integers(1, 30), max_size=40).map(
    lambda lengths: [
        (line, [line * 100 + i for i in range(length)])
        for line, length in enumerate(lengths, start=1)
    ]
)


@given(documents=DOCUMENTS, size=st.integers(2, 17))
def test_concatenate_is_one_long_text_cut(
    documents: list[tuple[int, list[int]]], size: int
) -> None:
    packed = [list(example.responses[0]) for _, example in rows(documents, size, "concatenate")]
    text = [token for _, ids in documents for token in ids]
    expected = [text[at : at + size] for at in range(0, len(text), size)]
    assert packed == [row for row in expected if len(row) > 1]


@given(documents=DOCUMENTS, size=st.integers(2, 17))
def test_best_fit_splits_no_document_that_fits(
    documents: list[tuple[int, list[int]]], size: int
) -> None:
    packed = [example for _, example in rows(documents, size, "best_fit")]
    assert all(example.num_tokens <= size and not example.prompt for example in packed)
    pieces = sorted(tuple(piece) for example in packed for piece in example.responses)
    expected = sorted(
        tuple(ids[at : at + size]) for _, ids in documents for at in range(0, len(ids), size)
    )
    assert pieces == [piece for piece in expected if len(piece) > 1]


def test_best_fit_by_hand() -> None:
    """Documents of 6 5 4 3 2 in rows of 10: 6+4 fill one exactly, 5+3+2 the other."""
    documents = [(line, [line] * length) for line, length in enumerate([2, 5, 6, 4, 3], start=1)]
    packed = [[len(r) for r in example.responses] for _, example in rows(documents, 10, "best_fit")]
    assert packed == [[2, 5, 3], [6, 4]]


def test_windows_bound_memory_and_waste_little(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "WINDOW", 200)
    rng = random.Random(0)
    documents = [(i, [i] * rng.randint(20, 900)) for i in range(2000)]
    used = [example.num_tokens for _, example in rows(documents, 1024, "best_fit")]
    assert sum(used) / (1024 * len(used)) > 0.95


def test_unknown_packing_is_refused() -> None:
    with pytest.raises(AlignkitError, match="choose one of concatenate, best_fit"):
        rows([], 8, "tight")  # type: ignore[arg-type]
    with pytest.raises(AlignkitError, match="block_size=1"):
        rows([], 1, "concatenate")


def test_documents_follow_the_policies(tokenizer_dir: Path) -> None:
    """Of six rows one is bad, one empty, one repeated, one holds a NUL: three documents stay."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    texts = ["bread", "", "water", "bread", "sa\x00lt"]
    source = Source(
        "rows", "0", lambda: enumerate([*({"text": text} for text in texts), {"words": ""}], 1)
    )
    policies = Policies(bad_rows="drop", repeated_prompts="drop")
    encoder = DocumentEncoder(tokenizer, block_size=64, packing="concatenate", policies=policies)
    tally = Tally()
    ((_, example),) = encoder.examples(source, tally)
    assert tokenizer.decode(example.responses[0]).split("<|endoftext|>") == [
        "bread",
        "water",
        "sa lt",
        "",
    ]
    assert tally.lines == {
        "rows": [1, 2, 3, 4, 5],
        "examples": [1],
        "empty_answers": [2],
        "repeated_prompts": [4],
        "control_characters": [5],
        "bad_rows": [6],
        "dropped": [2, 4, 6],
    }
    strict = Policies(empty_answers="error")
    encoder = DocumentEncoder(tokenizer, block_size=64, packing="concatenate", policies=strict)
    with pytest.raises(AlignkitError, match="rows:2: an empty document"):
        list(encoder.examples(source, Tally()))
