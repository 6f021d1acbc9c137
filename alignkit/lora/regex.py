"""Compare module paths with regular expressions of a config, in bounded time.

Python's own matcher backtracks: ``(a+)+b`` takes years on a path of sixty letters and cannot be
interrupted meanwhile. Here a pattern is matched by sets of positions: where a part of it can end,
from a given start, is found once and kept. A match then takes at most (parts of the pattern) x
(length of the path) steps. Whether a whole path matches does not depend on the order in which
alternatives are tried, so the answer is Python's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import lru_cache
from re import _parser as parser  # type: ignore[attr-defined,unused-ignore]
from typing import Any, NoReturn

from alignkit.errors import AlignkitError

_LONGEST = 10_000
_DEEPEST = 40
_SHOWN = 100
_MOST_STEPS = 50_000
"""The most steps of one match. Real patterns take some hundred."""

_FLAGS = re.UNICODE | re.VERBOSE | re.IGNORECASE | re.DOTALL | re.MULTILINE
_REFUSED = {
    "GROUPREF": "a reference to a group",
    "GROUPREF_EXISTS": "a condition on a group",
    "ATOMIC_GROUP": "an atomic group",
    "POSSESSIVE_REPEAT": "a possessive quantifier",
}
_ANCHORS = {
    "AT_BEGINNING": r"\A", "AT_BEGINNING_STRING": r"\A", "AT_END": r"\Z", "AT_END_STRING": r"\Z",
    "AT_BOUNDARY": r"\b", "AT_NON_BOUNDARY": r"\B",
}  # fmt: skip
_CATEGORIES = {
    "CATEGORY_DIGIT": r"\d", "CATEGORY_NOT_DIGIT": r"\D", "CATEGORY_SPACE": r"\s",
    "CATEGORY_NOT_SPACE": r"\S", "CATEGORY_WORD": r"\w", "CATEGORY_NOT_WORD": r"\W",
}  # fmt: skip


class _Text:
    """Hold a path that is matched, and count the steps taken on it."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.steps = 0
        self.known: dict[tuple[int, int], int] = {}


_Part = Callable[[_Text, int], int]
"""A function from a start to all positions where a part can end, as the bits of a number."""


class _TooManySteps(Exception):
    pass


class Pattern:
    """Compile a regular expression over module paths, in the syntax of `re`.

    Args:
        text: The expression.
        where: Names the setting, for messages.

    Raises:
        AlignkitError: It does not compile, is too long or too deeply nested, or it refers back to
            a group or forbids backtracking, which cannot be matched in bounded time.
    """

    def __init__(self, text: str, where: str) -> None:
        self._text, self._where = text, where
        if len(text) > _LONGEST:
            self._refuse(f"has {len(text):,} characters; list the modules instead")
        try:
            tree = parser.parse(text)
        except (re.error, RecursionError, OverflowError) as error:
            self._refuse(f"is no regular expression: {error}")
        self._flags = tree.state.flags
        if self._flags & ~_FLAGS:
            self._refuse("sets flags that paths have no use for; leave them out")
        self._whole = self._sequence(tree, 0)

    def fullmatch(self, path: str) -> bool:
        """Return whether the whole path matches.

        Raises:
            AlignkitError: The match takes too many steps.
        """
        try:
            return bool(self._whole(_Text(path), 0) >> len(path) & 1)
        except _TooManySteps:
            self._refuse("takes too long to match; write it simpler")

    def _refuse(self, why: str) -> NoReturn:
        shown = self._text if len(self._text) <= _SHOWN else f"{self._text[:_SHOWN]}…"
        raise AlignkitError(f"{self._where}: {shown!r} {why}") from None

    # Each of these turns a node of the syntax tree into a part --------------------------------

    def _sequence(self, tree: Any, depth: int) -> _Part:
        if depth > _DEEPEST:
            self._refuse(f"nests deeper than {_DEEPEST} groups; flatten it")
        parts = [self._node(operation.name, argument, depth) for operation, argument in tree]

        def ends(text: _Text, start: int) -> int:
            positions = 1 << start
            for part in parts:
                positions = _after(part, text, positions)
            return positions

        return _kept(ends)

    def _node(self, name: str, argument: Any, depth: int) -> _Part:
        if name in _REFUSED:
            self._refuse(
                f"uses {_REFUSED[name]}, which cannot be matched in bounded time; write it without"
            )
        if name == "SUBPATTERN":
            _, flags_on, flags_off, tree = argument
            if flags_on or flags_off:
                self._refuse("sets flags within a group; leave them out")
            return self._sequence(tree, depth + 1)
        if name == "BRANCH":
            branches = [self._sequence(branch, depth + 1) for branch in argument[1]]
            return _kept(lambda text, start: _union(branch(text, start) for branch in branches))
        if name in ("MAX_REPEAT", "MIN_REPEAT"):
            least, most, tree = argument
            return _repeat(self._sequence(tree, depth + 1), least, most)
        if name in ("ASSERT", "ASSERT_NOT"):
            direction, tree = argument
            # What lies behind always has one width: Python compiles nothing else.
            width = tree.getwidth()[0] if direction < 0 else 0
            return _assertion(self._sequence(tree, depth + 1), direction, width, name == "ASSERT")
        if name == "AT":
            anchor = re.compile(_ANCHORS[argument.name])
            return lambda text, start: 1 << start if anchor.match(text.path, start) else 0
        return _character(re.compile(_one_character(name, argument), self._flags))


@lru_cache(maxsize=4096)
def compiled(text: str, where: str) -> Pattern:
    """Return the `Pattern` of a regular expression, the same object every time.

    Raises:
        AlignkitError: As `Pattern`.
    """
    return Pattern(text, where)


def _kept(ends: _Part) -> _Part:
    """Keep the ends of a part from each start, so that one match finds them once."""

    def kept(text: _Text, start: int) -> int:
        key = id(kept), start
        if key not in text.known:
            text.known[key] = ends(text, start)
        return text.known[key]

    return kept


def _after(part: _Part, text: _Text, positions: int) -> int:
    """Return where a part can end from any of several positions."""
    reached, left = 0, positions
    while left:
        lowest = left & -left
        left ^= lowest
        text.steps += 1
        if text.steps > _MOST_STEPS:
            raise _TooManySteps
        reached |= part(text, lowest.bit_length() - 1)
    return reached


def _union(masks: Iterable[int]) -> int:
    total = 0
    for mask in masks:
        total |= mask
    return total


def _repeat(part: _Part, least: int, most: int) -> _Part:
    def ends(text: _Text, start: int) -> int:
        positions = 1 << start
        for _ in range(least):
            after = _after(part, text, positions)
            if after == positions:  # nothing left, or a part that may be empty: no more changes
                break
            positions = after
        reached = new = positions
        for _ in range(most - least):
            new = _after(part, text, new) & ~reached
            if not new:
                break
            reached |= new
        return reached

    return _kept(ends)


def _assertion(part: _Part, direction: int, width: int, wanted: bool) -> _Part:
    def ends(text: _Text, start: int) -> int:
        if direction < 0:
            holds = start >= width and bool(part(text, start - width) >> start & 1)
        else:
            holds = bool(part(text, start))
        return 1 << start if holds == wanted else 0

    return ends


def _character(meant: re.Pattern[str]) -> _Part:
    return lambda text, start: 1 << start + 1 if meant.match(text.path, start) else 0


def _one_character(name: str, argument: Any) -> str:
    """Write a node that matches one character as a regular expression of its own."""
    if name == "LITERAL":
        return re.escape(chr(argument))
    if name == "NOT_LITERAL":
        return f"[^{re.escape(chr(argument))}]"
    if name == "ANY":
        return "."
    if name != "IN":
        raise TypeError(f"unknown node {name} in a regular expression")
    pieces = []
    for kind, value in argument:
        if kind.name == "NEGATE":
            pieces.append("^")
        elif kind.name == "LITERAL":
            pieces.append(re.escape(chr(value)))
        elif kind.name == "RANGE":
            pieces.append("-".join(re.escape(chr(end)) for end in value))
        else:
            pieces.append(_CATEGORIES[value.name])
    return f"[{''.join(pieces)}]"
