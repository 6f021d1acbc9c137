"""Tell what was found in a source, and why nothing is left of one."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

log = logging.getLogger(__name__)


def count_defects(metas: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return the rows, examples and defects of all sources together."""
    totals: dict[str, float] = {}
    for meta in metas:
        for name, count in meta["counts"].items():
            totals[name] = totals.get(name, 0) + count
    examples = totals.get("examples", 0)
    totals["truncated_frac"] = totals.get("truncated", 0) / examples if examples else 0.0
    return totals


def why_empty(metas: Sequence[dict[str, Any]]) -> str:
    """Return why a split has no examples, and what to change."""
    counts = count_defects(metas)
    if counts.pop("examples", 0):
        return (
            "its examples were all held out or left out; give more rows, name the splits in "
            "data.splits, or raise data.max_train_examples and data.max_val_examples"
        )
    for sums in ("truncated_frac", "dropped"):
        counts.pop(sums, None)
    rows = f"{(count := counts.pop('rows', 0)):g} row{'s' if count != 1 else ''}"
    found = ", ".join(f"{defect} {count:g}" for defect, count in sorted(counts.items()))
    advice = "raise data.max_length" if counts.get("too_long") else "alignkit audit shows them"
    return f"its {rows} were all dropped ({found}); {advice}"


def log_counts(name: str, meta: dict[str, Any]) -> None:
    """Log the rows, examples and defects of one source."""
    counts, lines = dict(meta["counts"]), meta["lines"]
    rows, examples = counts.pop("rows", 0), counts.pop("examples", 0)
    details = "; ".join(
        f"{defect} {count} (line {', '.join(map(str, sorted(lines[defect])))}"
        f"{', …' if count > len(lines[defect]) else ''})"
        for defect, count in sorted(counts.items())
    )
    if columns := ", ".join(meta.get("columns", ())):
        details = f"{details or 'no defects'}; columns not read: {columns}"
    shapes = meta.get("shapes") or {}
    several = len(shapes) > 1
    told = " and ".join(f"{n} as {each}" if several else each for each, n in shapes.items())
    read = f"{'' if several else ' as'} {told}" if told else ""
    log.info(
        "%s: %d rows%s, %d examples; %s",
        name,
        rows,
        f", read{read}" if told else "",
        examples,
        details or "no defects",
    )
