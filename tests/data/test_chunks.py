"""Chunks are complete and in order, and work on them runs ahead by one."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from alignkit.data.encode.chunks import chunks, one_ahead


def test_chunks() -> None:
    assert list(chunks(range(5), 2)) == [[0, 1], [2, 3], [4]]
    assert list(chunks([], 2)) == []


def test_items_come_in_order_and_worked_on() -> None:
    items: list[list[int]] = [[i] for i in range(7)]
    seen = [list(item) for item in one_ahead(lambda item: item.append(-1), items)]
    assert seen == [[i, -1] for i in range(7)]
    assert list(one_ahead(print, [])) == []


def test_the_next_item_is_worked_on_while_this_one_is_used() -> None:
    """It would wait for ever if the work came after; two items are read ahead, not all."""
    begun = [threading.Event() for _ in range(9)]
    read: list[int] = []

    def items() -> Iterator[int]:
        for i in range(9):
            read.append(i)
            yield i

    for item in one_ahead(lambda i: begun[i].set(), items()):
        assert item == 8 or begun[item + 1].wait(timeout=60)
        assert len(read) <= item + 2


def test_errors_come_with_their_item() -> None:
    def work(item: int) -> None:
        if item == 2:
            raise ValueError("two")

    results = one_ahead(work, range(9))
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ValueError, match="two"):
        next(results)
