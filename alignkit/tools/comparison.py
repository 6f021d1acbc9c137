"""Define what `alignkit compare` found, and show it as Markdown, JSON and a terminal's table."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from math import isnan
from typing import Any

from rich.table import Table

from alignkit.tools.generate.gauges import Gauges
from alignkit.tools.generate.request import printable
from alignkit.tools.judge.rating import Rating, share
from alignkit.tools.markdown import markdown_cell, markdown_table


@dataclass
class Comparison:
    """Hold the answers of several models to the same prompts.

    Example:
        >>> found = Comparison(["Hi"], answers={"sft": ["Hello."], "dpo": ["Hello there."]})
        >>> print(found.to_markdown().rstrip())
        | Prompt | sft | dpo |
        | --- | --- | --- |
        | Hi | Hello. | Hello there. |

    Attributes:
        prompts: As the user gave them.
        answers: From a model's name to one answer for each prompt, in the order of the models.
        asked: From a model's name to the prompt format and system message it was asked with.
        failures: From a model's name to the line that says why it gave no answers.
        gauges: From a model's name to what is measured of its answers.
        gauge_errors: The standard errors of these.
        scores: From a model's name to the judge's score of each answer.
        ratings: From a model's name to how its answers compare with the first model's.
    """

    prompts: list[str]
    answers: dict[str, list[str]] = field(default_factory=dict)
    asked: dict[str, dict[str, str | None]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    gauges: dict[str, Gauges] = field(default_factory=dict)
    gauge_errors: dict[str, Gauges] = field(default_factory=dict)
    scores: dict[str, list[float]] = field(default_factory=dict)
    ratings: dict[str, Rating] = field(default_factory=dict)

    def to_markdown(self) -> str:
        """Return a Markdown table with a row a prompt and a column a model, and the failures."""
        lines = [markdown_table(["Prompt", *self.answers], self._rows())]
        lines += [f"\n{markdown_cell(f'{name}: {v}')}" for name, v in self.verdicts().items()]
        lines += [
            f"\n{markdown_cell(name)} failed: {markdown_cell(why)}"
            for name, why in self.failures.items()
        ]
        return "\n".join(lines) + "\n"

    def to_dict(self) -> dict[str, Any]:
        """Return the comparison as JSON values, without a judge's where there was none."""
        found = asdict(self)
        for name in ("gauges", "gauge_errors", "ratings"):
            found[name] = {key: _values(value) for key, value in getattr(self, name).items()}
        return {
            key: value for key, value in found.items() if value or key not in ("scores", "ratings")
        }

    def to_table(self) -> Table:
        """Return the same table for the terminal."""
        table = Table(show_lines=True, expand=True)
        for header in ("Prompt", *self.answers):
            table.add_column(printable(header), ratio=1, overflow="fold")
        for row in self._rows():
            table.add_row(*map(printable, row))
        return table

    def summary(self) -> list[str]:
        """Return a line on each model's answers: what is measured of them, and how they rate."""
        verdicts = self.verdicts()
        return [
            f"{name}: {'; '.join([str(gauges), *([verdicts[name]] if name in verdicts else [])])}"
            for name, gauges in self.gauges.items()
        ]

    def verdicts(self) -> dict[str, str]:
        """Return what the judge says of each model's answers, nothing without a judge."""
        first = next(iter(self.ratings), "")
        said = {}
        for name, rating in self.ratings.items():
            said[name] = f"mean score {rating.score:.4g}"
            if name != first:
                said[name] += (
                    f", above {first} in {share(rating.wins, rating.wins_error)}, at equal length "
                    f"{share(rating.equal_length, rating.equal_length_error)}"
                )
        return said

    def _rows(self) -> list[tuple[str, ...]]:
        return list(zip(self.prompts, *self.answers.values(), strict=True))


def _values(numbers: Gauges | Rating) -> dict[str, float | None]:
    """Return numbers by name; one that is not defined, as a single answer's error, is ``None``."""
    return {k: None if isnan(value) else value for k, value in numbers._asdict().items()}
