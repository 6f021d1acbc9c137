"""Collect what an audit finds, and make its report."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from alignkit.data.text.defects import readable
from alignkit.data.text.policies import MEANING, Policies, Tally

_PERCENTILES = (1, 5, 25, 50, 75, 95, 99)


@dataclass
class Findings:
    """Hold the defects and the lengths that an audit found.

    Example:
        >>> found = Findings({"kind": "sft", "tokenizer": None})
        >>> found.add("empty_answers", row=3, text="Human: Hi", limit=1)
        >>> found.examples
        {'empty_answers': [{'row': 3, 'text': 'Human: Hi'}]}

    Attributes:
        settings: The audit's arguments: path, kind, tokenizer, unit, max_length, prompt_format.
        tally: Rows by defect, and their numbers; a second source's continue the first one's.
        sources: Name, first row number and number of rows of each source.
        files: A line about each kind of file beside them that is not read.
        examples: A few examples of each defect: row number and text.
        lengths: Lengths in tokens of every prompt, of every chosen and rejected answer with its
            EOS, and of the longest prompt + answer of each row; of every document, for text.
        tokens_apart: Number of tokens with a prompt for every answer.
        tokens_shared: Number of tokens with each prompt once.
    """

    settings: dict[str, Any]
    tally: Tally = field(default_factory=lambda: Tally(lines_kept=None))
    sources: list[dict[str, Any]] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    examples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    lengths: dict[str, array[int]] = field(default_factory=dict)
    tokens_apart: int = 0
    tokens_shared: int = 0

    def add(self, defect: str, row: int, text: str, limit: int) -> None:
        """Count a row with a defect, and keep its text if there are fewer than ``limit``."""
        self.tally.add(defect, row)
        kept = self.examples.setdefault(defect, [])
        if len(kept) < limit:
            kept.append({"row": row, "text": readable(text)})

    def measure(self, **lengths: int) -> None:
        """Record lengths in tokens by name."""
        for name, length in lengths.items():
            self.lengths.setdefault(name, array("q")).append(length)

    def _unusable_rows(self) -> set[int]:
        """Return the numbers of the rows that training would not use by default."""
        policies = Policies()
        lost = (name for name in MEANING if getattr(policies, name, "") in ("drop", "error"))
        return {row for name in lost for row in self.tally.lines.get(name, ())}

    def to_dict(self) -> dict[str, Any]:
        """Return the report; see `alignkit.tools.audit.command.audit`."""
        counts = {name: self.tally.counts.get(name, 0) for name in ["rows", *MEANING]}
        if self.settings["tokenizer"] is None:
            del counts["boundary"]  # found only with a tokenizer
        report: dict[str, Any] = {
            **self.settings,
            **counts,
            "row_numbers": {
                name: sorted(self.tally.lines.get(name, [])) for name in counts if name != "rows"
            },
            "usable": counts["rows"] - len(self._unusable_rows()),
            "read_as": self.tally.shapes,
            "columns_not_read": sorted(self.tally.columns),
            "files_not_read": self.files,
            "sources": self.sources,
            "examples": self.examples,
            "lengths": {name: _summary(values) for name, values in self.lengths.items()},
            "repeated_prompt_share": counts["repeated_prompts"] / max(1, counts["rows"]),
        }
        if self.settings["kind"] == "preference" and self.lengths:
            chosen, rejected = (np.array(self.lengths[side]) for side in ("chosen", "rejected"))
            report["length_bias"] = {
                "chosen_mean": float(chosen.mean()),
                "rejected_mean": float(rejected.mean()),
                "chosen_longer_share": float((chosen > rejected).mean()),
                "equal_share": float((chosen == rejected).mean()),
            }
            report["prompt_sharing"] = {
                "tokens_apart": self.tokens_apart,
                "tokens_shared": self.tokens_shared,
                "saved_share": 1 - self.tokens_shared / self.tokens_apart,
            }
        return report


def _summary(values: array[int]) -> dict[str, float]:
    numbers = np.array(values)
    percentiles = np.percentile(numbers, _PERCENTILES)
    summary = {f"p{at}": float(value) for at, value in zip(_PERCENTILES, percentiles, strict=True)}
    return {"mean": float(numbers.mean()), **summary, "max": float(numbers.max())}
