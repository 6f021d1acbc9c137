"""Rows that were rendered before: a prompt and answers as they are, for ``prompt_format: raw``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from alignkit.data.dialogue import RowError
from alignkit.data.shapes import Side, preference_sides, sft_sides

Sides = Callable[[Mapping[str, Any]], list[Side]]


def reader(sides: Sides) -> Sides:
    """What reads raw rows where ``sides`` reads the others; a reader of one's own stays."""
    twins: dict[Sides, Sides] = {preference_sides: raw_preference_sides, sft_sides: raw_sft_sides}
    return twins.get(sides, sides)


def raw_preference_sides(row: Mapping[str, Any]) -> list[Side]:
    """The sides of ``prompt`` with ``chosen`` and ``rejected``, or with ranked ``responses``.

    Raises:
        RowError: A missing key, or a value that is not text.
    """
    prompt = _text(row, "prompt")
    if row.get("responses") is None:
        return [_side(prompt, _text(row, key)) for key in ("chosen", "rejected")]
    responses = row["responses"]
    if not isinstance(responses, list) or len(responses) < 2:
        raise RowError("`responses` must be a list of two or more, best first")
    if not all(isinstance(response, str) for response in responses):
        raise RowError("`responses` must hold text, for prompt_format=raw")
    return [_side(prompt, response) for response in responses]


def raw_sft_sides(row: Mapping[str, Any]) -> list[Side]:
    """The one side of ``prompt`` with ``completion``, or of any row above with its best answer.

    Raises:
        RowError: As `raw_preference_sides`.
    """
    if row.get("responses") is not None:
        return raw_preference_sides(row)[:1]
    key = "completion" if row.get("completion") is not None else "chosen"
    return [_side(_text(row, "prompt"), _text(row, key))]


def _side(prompt: str, answer: str) -> Side:
    return Side(prompt, answer, ())  # no turns that anyone could tell apart


def _text(row: Mapping[str, Any], key: str) -> str:
    value = row.get(key)
    if not isinstance(value, str):
        found = "it is missing" if value is None else f"it is a {type(value).__name__}"
        raise RowError(f"prompt_format=raw needs `{key}` as text ({found})")
    return value
