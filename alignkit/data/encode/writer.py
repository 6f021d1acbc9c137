"""Define what encoders hand their examples to."""

from __future__ import annotations

from typing import Protocol

from alignkit.batch import Example


class ExampleWriter(Protocol):
    """Take examples one by one, in order.

    Attributes:
        examples: How many it has taken.
    """

    examples: int

    def add(self, example: Example, line: int) -> None:
        """Take one example, read from ``line`` of its source."""
