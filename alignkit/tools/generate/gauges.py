"""Measure how often answers are empty, end, repeat themselves or run on into the human's turn."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean, stdev
from typing import NamedTuple

from alignkit.tools.generate.answer import Answer
from alignkit.tools.generate.prompts import TURN


class Gauges(NamedTuple):
    r"""Hold what is measured of a set of answers.

    Example:
        >>> Gauges.of([Answer("Yes.\n\nHuman: And?", (5, 6, 7, 8), ended=False)])
        Gauges(repetition=0.0, run_on=1.0, ended=0.0, empty=0.0, tokens=4.0)

    Attributes:
        repetition: The mean share of three-token sequences that occurred before in an answer.
        run_on: The share of answers that go on to write the human's next turn, whether they were
            stopped there or not.
        ended: The share that the model ended by itself, by its end token.
        empty: The share without a text.
        tokens: The mean number of tokens.
    """

    repetition: float
    run_on: float
    ended: float
    empty: float
    tokens: float

    @classmethod
    def of(cls, answers: Sequence[Answer]) -> Gauges:
        """Measure answers, one at least."""
        return cls(*map(mean, _columns(answers)))

    @classmethod
    def errors(cls, answers: Sequence[Answer]) -> Gauges:
        """Return the standard errors of what `of` returns; NaN for a single answer."""
        if len(answers) < 2:
            return cls(*[float("nan")] * len(cls._fields))
        return cls(*(stdev(column) / len(column) ** 0.5 for column in _columns(answers)))

    def __str__(self) -> str:
        """Return the gauges as a line."""
        return (
            f"{self.tokens:.1f} tokens, {self.ended:.0%} ended by itself, {self.empty:.0%} empty, "
            f"{self.repetition:.1%} repeated, {self.run_on:.0%} run on into the human's turn"
        )


def _columns(answers: Sequence[Answer]) -> list[list[float]]:
    rows = [
        (a.repetition, a.ran_on or TURN in f"\n\n{a.text}", bool(a.end), not a.text, len(a.ids))
        for a in answers
    ]
    return [[float(value) for value in column] for column in zip(*rows, strict=True)]
