"""Split rows into chunks, and prepare later chunks while an earlier one is used.

An error never overtakes what comes before it: items are given out up to the one that failed, so
that of several bad rows the first is told.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class _Failure:
    """Hold what was raised instead of an item."""

    error: Exception


def chunks(items: Iterable[_Item], size: int) -> Iterator[list[_Item]]:
    """Yield lists of up to ``size`` items, in order.

    Raises:
        Exception: Whatever the items raised, after a list of those before.
    """
    chunk: list[_Item] = []
    for item in _caught(items):
        if isinstance(item, _Failure):
            if chunk:
                yield chunk
            raise item.error
        chunk.append(item)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def ahead(
    begin: Callable[[_Item], Callable[[], _Result]], items: Iterable[_Item], most: int
) -> Iterator[_Result]:
    """Yield what becomes of the items, in order, with work on later ones begun.

    Args:
        begin: Begins the work on an item elsewhere, and returns what waits for its result.
        items: What to work on; read as far ahead as work has begun, and one item more.
        most: How many may be begun at once.

    Raises:
        Exception: Whatever the work or the items raised, when its item is due.
    """
    begun: deque[Callable[[], _Result]] = deque()
    for item in _caught(items):
        if isinstance(item, _Failure):
            yield from (finish() for finish in begun)
            raise item.error
        done = [begun.popleft()()] if len(begun) == most else []
        begun.append(begin(item))
        yield from done
    yield from (finish() for finish in begun)


def one_ahead(work: Callable[[_Item], object], items: Iterable[_Item]) -> Iterator[_Item]:
    """Yield the items in order, each once ``work`` has finished with it in a thread.

    While the caller uses an item, the next one is worked on. ``work`` should leave Python to the
    caller most of the time, as a tokenizer does.

    Raises:
        Exception: Whatever ``work`` or the items raised, when its item is due.
    """

    def begin(item: _Item) -> Callable[[], _Item]:
        job = thread.submit(work, item)

        def finish() -> _Item:
            job.result()
            return item

        return finish

    with ThreadPoolExecutor(max_workers=1) as thread:
        yield from ahead(begin, items, most=1)


def _caught(items: Iterable[_Item]) -> Iterator[_Item | _Failure]:
    """Yield the items and, instead of raising, what their iterator raised."""
    try:
        yield from items
    except Exception as error:
        yield _Failure(error)
