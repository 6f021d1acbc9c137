"""Read unpaired rows: an answer, and whether it is a good one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from alignkit.data.text.dialogue import RowError
from alignkit.data.text.fields import truth_of
from alignkit.data.text.shapes import Side, Sides, sft_sides

LABEL = "label"


def unpaired_sides(row: Mapping[str, Any]) -> list[Side]:
    """Return the one side of a row as SFT reads it, with what its ``label`` says.

    Raises:
        RowError: As `sft_sides`, and for a ``label`` that is missing or neither true nor false.
    """
    return labelled(row, sft_sides)


def labelled(row: Mapping[str, Any], sides: Sides) -> list[Side]:
    """Return the sides of a row without its label, and the label on each.

    Raises:
        RowError: There is no label, or one that is neither true nor false.
    """
    good = truth_of(row.get(LABEL))
    if good is None:
        told = repr(row[LABEL])[:20] if row.get(LABEL) is not None else "missing"
        raise RowError(f"`label` must say whether the answer is good, true or false (it is {told})")
    rest = {name: value for name, value in row.items() if name != LABEL}
    return [side._replace(label=good) for side in sides(rest)]
