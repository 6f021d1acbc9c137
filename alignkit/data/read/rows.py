"""Define what reading gives: rows with their places, and rows that could not be read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

MAX_LINE_BYTES = 16 * 2**20
"""A longer line is a bad row: no text worth training on in one piece is that long."""


class BadRow(NamedTuple):
    """Hold why a row could not be read, in a few words.

    Example:
        >>> BadRow("3 values for 2 columns").reason
        '3 values for 2 columns'
    """

    reason: str


Row = Mapping[str, Any] | BadRow
Rows = Iterator[tuple[int, Row]]


@dataclass(frozen=True)
class Source:
    """Hold a name, a digest and a reader of rows that can be read again and again.

    Example:
        >>> source = Source("train.jsonl", "0f3c", lambda: iter([(1, {"text": "2 + 2 is 4."})]))
        >>> list(source.rows())
        [(1, {'text': '2 + 2 is 4.'})]

    Attributes:
        name: What a person calls it: the file's path, or ``hub-id[split]``.
        digest: Hash of the content, so that a cache knows when it changed.
        rows: Starts reading; yields ``(line, row)`` with lines counted from 1. Where a format has
            no lines, it is the row's number.
    """

    name: str
    digest: str
    rows: Callable[[], Rows]
