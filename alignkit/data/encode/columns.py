"""Give a row's columns the names that are read, where the row has others."""

from __future__ import annotations

from collections.abc import Mapping

from alignkit.data.read.rows import BadRow, Row
from alignkit.data.text.dialogue import RowError
from alignkit.data.text.recognise import renamed


def named_row(row: Row, columns: Mapping[str, str] | None) -> Row:
    """Return a row with the column names that are read, or why it cannot be."""
    if columns is None or isinstance(row, BadRow):
        return row
    try:
        return renamed(row, columns)
    except RowError as error:
        return BadRow(str(error))
