"""Find the nearest known word."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``; did you mean …?`` with the closest known name, empty without a close one.

    Example:
        >>> did_you_mean("max_step", ["max_steps", "max_epochs"])
        '; did you mean max_steps?'
    """
    close = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if name and close else ""
