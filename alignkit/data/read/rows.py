"""What reading gives: rows with the place of each one, and those that could not be read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

MAX_LINE_BYTES = 16 * 2**20
"""A longer line is a bad row: no text worth training on in one piece is that long."""


class BadRow(NamedTuple):
    """A row that could not be read, and why, in a few words."""

    reason: str


Row = Mapping[str, Any] | BadRow
Rows = Iterator[tuple[int, Row]]


@dataclass(frozen=True)
class Source:
    """Rows that can be read again and again.

    Attributes:
        name: What a person calls it: the file's path, or ``hub-id[split]``.
        digest: Hash of the content, so that a cache knows when it changed.
        rows: Starts reading; yields ``(line, row)`` with lines counted from 1. Where a format has
            no lines, it is the row's number.
    """

    name: str
    digest: str
    rows: Callable[[], Rows]
