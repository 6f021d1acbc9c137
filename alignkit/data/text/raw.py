"""Read rows that were rendered before, for ``prompt_format: raw``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from alignkit.data.text.dialogue import RowError
from alignkit.data.text.fields import unread_columns
from alignkit.data.text.shapes import (
    PREFERENCE_COLUMNS,
    SFT_COLUMNS,
    Side,
    Sides,
    preference_sides,
    sft_sides,
    with_label,
)
from alignkit.data.text.unpaired import labelled, unpaired_sides


def reader(sides: Sides) -> Sides:
    """Return the reader of raw rows that belongs to ``sides``; a user's own reader stays."""
    twins: dict[Sides, Sides] = {
        preference_sides: raw_preference_sides,
        sft_sides: raw_sft_sides,
        unpaired_sides: raw_unpaired_sides,
    }
    return twins.get(sides, sides)


def raw_preference_sides(row: Mapping[str, Any]) -> list[Side]:
    """Return the sides of ``prompt`` with ``chosen`` and ``rejected``, or ``responses``.

    Raises:
        RowError: A missing key, or a value that is not text.
    """
    prompt = _text(row, "prompt")
    if row.get("responses") is None:
        answers = [_text(row, key) for key in ("chosen", "rejected")]
        return [_side(row, prompt, answer, PREFERENCE_COLUMNS) for answer in answers]
    responses = row["responses"]
    if not isinstance(responses, list) or len(responses) < 2:
        raise RowError("`responses` must be a list of two or more, best first")
    if not all(isinstance(response, str) for response in responses):
        raise RowError("`responses` must hold text, for prompt_format=raw")
    return [_side(row, prompt, response, PREFERENCE_COLUMNS) for response in responses]


def raw_sft_sides(row: Mapping[str, Any]) -> list[Side]:
    """Return the side of ``prompt`` with ``completion``, or with a ranked row's best answer.

    Raises:
        RowError: As `raw_preference_sides`.
    """
    if row.get("responses") is not None:
        return [with_label(raw_preference_sides(row)[0], row)]
    key = "completion" if row.get("completion") is not None else "chosen"
    side = _side(row, _text(row, "prompt"), _text(row, key), SFT_COLUMNS)
    return [with_label(side, row)]


def raw_unpaired_sides(row: Mapping[str, Any]) -> list[Side]:
    """Return the side of `raw_sft_sides` with what the row's ``label`` says.

    Raises:
        RowError: As `raw_preference_sides` and `unpaired_sides`.
    """
    return labelled(row, raw_sft_sides)


def _side(row: Mapping[str, Any], prompt: str, answer: str, columns: frozenset[str]) -> Side:
    unread = tuple(unread_columns(row, columns, [prompt]))
    return Side(prompt, answer, (), unread=unread)  # no turns that anyone could tell apart


def _text(row: Mapping[str, Any], key: str) -> str:
    value = row.get(key)
    if not isinstance(value, str):
        found = "it is missing" if value is None else f"it is a {type(value).__name__}"
        raise RowError(f"prompt_format=raw needs `{key}` as text ({found})")
    return value
