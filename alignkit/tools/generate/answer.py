"""Define an answer with what is known of it beside its text."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

_GRAM = 3


class Answer(NamedTuple):
    """Hold an answer and how it came about.

    Example:
        >>> Answer("a b c a b c", (5, 6, 7, 5, 6, 7), ended=False).repetition
        0.25

    Attributes:
        text: The answer.
        ids: Its tokens, without the one that ended it.
        ended: Whether it came to an end; ``False`` if it was cut at ``max_new_tokens``.
        end: The token that ended it, if one did.
    """

    text: str
    ids: tuple[int, ...]
    ended: bool
    end: tuple[int, ...] = ()

    @property
    def ran_on(self) -> bool:
        """Tell whether it was stopped where it began to write the human's next turn."""
        return self.ended and not self.end

    @property
    def repetition(self) -> float:
        """Return the share of three-token sequences that occurred before in the answer."""
        grams = [self.ids[i : i + _GRAM] for i in range(len(self.ids) - _GRAM + 1)]
        return sum(n - 1 for n in Counter(grams).values()) / len(grams) if grams else 0.0
