"""Put documents into rows of ``block_size`` tokens, end to end or packed whole."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

from alignkit.engine import Example
from alignkit.errors import AlignkitError

Packing = Literal["concatenate", "best_fit"]
Document = tuple[int, list[int]]
"""A document's line and its token ids, EOS last."""

WINDOW = 8192
"""Documents that best-fit packing looks at together; bounds its memory."""


def rows(
    documents: Iterable[Document], block_size: int, packing: Packing
) -> Iterator[tuple[int, Example]]:
    """Yield rows of up to ``block_size`` tokens, each with the line of its first document.

    Args:
        documents: In order, each with its EOS.
        block_size: Tokens of a row.
        packing: ``concatenate`` lays documents end to end and cuts every ``block_size`` tokens,
            so that a row may begin and end inside a document and a token sees the documents
            before its own. ``best_fit`` puts each document whole into the fullest row that has
            room (best-fit decreasing), and none sees another; only documents longer than a row
            are cut.

    Raises:
        AlignkitError: An unknown ``packing`` or a ``block_size`` under 2.
    """
    if block_size < 2:
        raise AlignkitError(f"data.block_size={block_size}: give at least 2")
    packers = {"concatenate": _concatenate, "best_fit": _best_fit}
    if packing not in packers:
        raise AlignkitError(f"data.packing={packing!r}: choose one of {', '.join(packers)}")
    return packers[packing](documents, block_size)


def _concatenate(documents: Iterable[Document], size: int) -> Iterator[tuple[int, Example]]:
    row: list[int] = []
    first = 0
    for line, ids in documents:
        taken = 0
        while taken < len(ids):
            if not row:
                first = line
            room = size - len(row)
            row += ids[taken : taken + room]
            taken += room
            if len(row) == size:
                yield first, Example([], [row])
                row = []
    if len(row) > 1:  # a single token has nothing to be predicted from
        yield first, Example([], [row])


def _best_fit(documents: Iterable[Document], size: int) -> Iterator[tuple[int, Example]]:
    window: list[Document] = []
    for line, ids in documents:
        window += [(line, ids[start : start + size]) for start in range(0, len(ids), size)]
        if len(window) >= WINDOW:
            yield from _pack(window, size)
            window = []
    yield from _pack(window, size)


def _pack(pieces: Sequence[Document], size: int) -> Iterator[tuple[int, Example]]:
    """Put the longest document first, each into the fullest row that it fits.

    This is best-fit decreasing (Johnson 1973).

    A row is one example without a prompt whose responses are its documents: the engine shows no
    response another, so documents share a row without sharing a context.
    """
    packed: list[list[Document]] = []
    free: list[tuple[int, int]] = []  # (tokens left, row), sorted
    for piece in sorted(pieces, key=lambda piece: -len(piece[1])):
        length = len(piece[1])
        if length < 2:
            break  # the EOS left over from a cut document: nothing to predict it from
        at = bisect_left(free, (length, -1))
        left, row = free.pop(at) if at < len(free) else (size, len(packed))
        if row == len(packed):
            packed.append([])
        packed[row].append(piece)
        if left - length > 1:
            insort(free, (left - length, row))
    for row_pieces in sorted(packed, key=lambda each: min(line for line, _ in each)):
        row_pieces.sort(key=lambda piece: piece[0])
        yield row_pieces[0][0], Example([], [ids for _, ids in row_pieces])
