"""Read which rows make up each split, as ``data.splits`` says it: names, and slices of them.

The notation is the one of the datasets library: ``train_prefs``, ``train[:5%]``,
``train[100:200]``, ``train[-10%:]``, and sums such as ``train_sft+train_prefs[:100]``.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import NamedTuple

from alignkit.data.read.hashes import digest_of
from alignkit.data.read.rows import Rows, Source
from alignkit.data.read.split_names import SPLITS
from alignkit.errors import AlignkitError

_BOUND = r"(-?\d[\d_]*%?)?"
_SLICE = re.compile(rf"([^\[\]+]+?)\s*(?:\[\s*{_BOUND}\s*:\s*{_BOUND}\s*\])?")


class Slice(NamedTuple):
    """Hold which rows of one named split are taken.

    Example:
        >>> part = parse_splits({"train": "train_prefs[:5%]"})["train"][0]
        >>> part.name, part.bounds(200)
        ('train_prefs', (0, 10))

    Attributes:
        name: The split's name, as the set has it.
        first: Where the slice begins, as it was written; empty for the first row.
        last: Where it ends, in the same way; empty for the last row.
    """

    name: str
    first: str = ""
    last: str = ""

    def __str__(self) -> str:
        return f"{self.name}[{self.first}:{self.last}]" if self.first or self.last else self.name

    @property
    def relative(self) -> bool:
        """Tell whether the bounds depend on how many rows there are."""
        return any(bound.startswith("-") or bound.endswith("%") for bound in self[1:])

    def bounds(self, total: int) -> tuple[int, int]:
        """Return the first row that is taken, from 0, and the one after the last, of ``total``."""
        first = _row(self.first, total) if self.first else 0
        return first, _row(self.last, total) if self.last else total


def parse_splits(splits: Mapping[str, str] | None) -> dict[str, list[Slice]] | None:
    """Return the slices that make up each split; ``None`` where nothing is said.

    Raises:
        AlignkitError: A split that there is not, or a slice that cannot be read.
    """
    if not splits:
        return None
    parsed = {}
    for split, told in splits.items():
        if split not in SPLITS:
            near = get_close_matches(str(split), SPLITS, 1)
            meant = f"; did you mean {near[0]}?" if near else ""
            raise AlignkitError(f"data.splits: {split!r} is none of {', '.join(SPLITS)}{meant}")
        parsed[split] = [_parse(split, part.strip()) for part in str(told).split("+")]
    return parsed


def _parse(split: str, told: str) -> Slice:
    match = _SLICE.fullmatch(told)
    if match is None:
        raise AlignkitError(
            f"data.splits: {split}: {told!r} cannot be read; give a split's name, with a slice "
            "such as train_prefs[:5%] or train[100:200] where not all of it is meant"
        )
    part = Slice(*(group or "" for group in match.groups()))
    given = [bound for bound in part[1:] if bound]
    if len({bound.endswith("%") for bound in given}) > 1:
        raise AlignkitError(f"data.splits: {split}: {told!r} mixes rows and per cent; give one")
    if not part.relative and len(given) == 2 and int(part.first) >= int(part.last):
        raise AlignkitError(f"data.splits: {split}: {told!r} takes no row")
    return part


def take(sources: Sequence[Source], part: Slice) -> list[Source]:
    """Return the sources with only the rows of a slice, which counts over all of them.

    Rows are counted only when they are read, and only where the slice depends on it.
    """
    if not (part.first or part.last):
        return list(sources)

    counted: dict[int, int] = {}

    def count(indices: range) -> int:
        for index in indices:
            if index not in counted:
                counted[index] = sum(1 for _ in sources[index].rows())
        return sum(counted[index] for index in indices)

    def cut(index: int) -> Source:
        def rows() -> Rows:
            everything = range(len(sources))
            total = count(everything) if part.relative else sys.maxsize
            first, last = part.bounds(total)
            at = count(everything[:index])
            for line, row in sources[index].rows() if at < last else ():
                if at >= last:
                    break
                if at >= first:
                    yield line, row
                at += 1
            if index == everything[-1] and first >= min(at, last):
                there = total if part.relative else at
                raise AlignkitError(f"data.splits: {part} takes none of the {there:,} rows there")

        content = "\n".join([f"{index} {part}", *(source.digest for source in sources)])
        return Source(sources[index].name, digest_of(content.encode()), rows)

    return [cut(index) for index in range(len(sources))]


def _row(bound: str, total: int) -> int:
    """Return the row that a bound stands for, rounded and cut as the datasets library does."""
    number = int(bound.removesuffix("%"))
    at = round(number * total / 100) if bound.endswith("%") else number
    return min(max(0, at if number >= 0 else total + at), total)


def pick_splits(
    place: str, offered: Collection[str], asked: Collection[str] | None = None
) -> list[str]:
    """Return which of the splits that a place has are read: those asked for, or the standard ones.

    Args:
        place: Where they are, for the error.
        offered: The names there are.
        asked: The names that ``data.splits`` holds; ``None`` where it says nothing.

    Raises:
        AlignkitError: A name that is asked for is not there, or no standard one is.
    """
    told = ", ".join(map(str, offered)) or "none"
    if asked is not None:
        if missing := next((name for name in asked if name not in offered), None):
            near = get_close_matches(missing, list(map(str, offered)), 1)
            meant = f"; did you mean {near[0]}?" if near else ""
            raise AlignkitError(f"data.splits: {place} has no split {missing}, only {told}{meant}")
        return list(asked)
    standard = [name for name in SPLITS if name in offered]
    if not standard:
        raise AlignkitError(
            f"data.path {place}: it has no split named train, validation or test, only {told}; "
            f"name those to read{example_of(offered)}"
        )
    return standard


def example_of(offered: Iterable[str]) -> str:
    """Return how ``data.splits`` may name one of the splits there are; empty without any."""
    names = sorted(map(str, offered), key=lambda name: not name.startswith("train"))
    return f", as in data.splits='{json.dumps({'train': names[0]})}'" if names else ""
