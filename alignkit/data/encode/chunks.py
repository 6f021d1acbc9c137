"""Split rows into chunks, and prepare the next chunk while the last one is used."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

_Item = TypeVar("_Item")


def chunks(items: Iterable[_Item], size: int) -> Iterator[list[_Item]]:
    """Yield lists of up to ``size`` items, in order."""
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk


def one_ahead(work: Callable[[_Item], object], items: Iterable[_Item]) -> Iterator[_Item]:
    """Yield the items in order, each once ``work`` has finished with it in a thread.

    While the caller uses an item, the next one is worked on. ``work`` should leave Python to the
    caller most of the time, as a tokenizer does.

    Raises:
        Exception: Whatever ``work`` raised, when its item is due.
    """
    with ThreadPoolExecutor(max_workers=1) as thread:
        before: tuple[_Item, Future[object]] | None = None
        for item in items:
            job = thread.submit(work, item)
            if before is not None:
                before[1].result()
                yield before[0]
            before = item, job
        if before is not None:
            before[1].result()
            yield before[0]
