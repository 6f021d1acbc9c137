"""Define what a shape of row is: its columns, and how they are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

Columns = Mapping[str, Any]
Read = Callable[[Columns], dict[str, Any]]


class Shape(NamedTuple):
    """Describe one shape of row: its name, its columns, and how it is read.

    Example:
        >>> shape = Shape("riddles", ("riddle", "solution"),
        ...               lambda row: {"prompt": row["riddle"], "completion": row["solution"]})
        >>> sorted(shape.columns)
        ['riddle', 'solution']

    Attributes:
        name: What people call it, for one row or many.
        needs: The columns that make it.
        read: The columns of the same row that are understood, from those that it has.
        also: Columns that ``read`` takes where they are set.
        last: Whether a row is read so only where no other shape fits.
    """

    name: str
    needs: tuple[str, ...]
    read: Read = lambda row: {}
    also: tuple[str, ...] = ()
    last: bool = False

    @property
    def columns(self) -> frozenset[str]:
        """Return all columns that the shape reads."""
        return frozenset((*self.needs, *self.also))


class Shapes(tuple[Shape, ...]):
    """List shapes, known as a key by the list itself: to hash a hundred takes longer than a row.

    Example:
        >>> shapes = Shapes([Shape("riddles", ("riddle", "solution"))])
        >>> shapes[0].name, shapes == Shapes(shapes)
        ('riddles', False)
    """

    __slots__ = ()

    def __hash__(self) -> int:
        return id(self)

    def __eq__(self, other: object) -> bool:
        return self is other


SPOKEN = frozenset(("prompt", "messages", "completion", "chosen", "rejected", "responses"))
"""What is said in a row, in the columns that are understood."""
