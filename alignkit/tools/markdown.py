"""Write tables in Markdown whose cells show text as it is."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence

_ESCAPED = re.compile(r"([\\`*_\[\]|])")
_ENTITIES = {"~": "&#126;", "$": "&#36;"}  # some readers know no backslash before these


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    r"""Return a table in Markdown, without a newline at its end.

    Example:
        >>> print(markdown_table(["Prompt", "Answer"], [["2 * 3?", "6"]]))
        | Prompt | Answer |
        | --- | --- |
        | 2 \* 3? | 6 |

    Args:
        header: A name for each column.
        rows: A text for each column.
    """
    cells = [[markdown_cell(text) for text in row] for row in (header, *rows)]
    cells.insert(1, ["---"] * len(header))
    return "\n".join("| " + " | ".join(row) + " |" for row in cells)


def markdown_cell(text: str) -> str:
    """Return a cell of a table in Markdown that shows exactly the text."""
    escaped = _ESCAPED.sub(r"\\\1", html.escape(text, quote=False))
    for character, entity in _ENTITIES.items():
        escaped = escaped.replace(character, entity)
    return escaped.replace("\r", "").replace("\n", "<br>")
