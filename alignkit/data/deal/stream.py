"""Encode and pack text while training reads it, for data sets larger than the disk."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice

from torch.utils.data import IterableDataset

from alignkit.data.read.rows import Rows, Source
from alignkit.data.text.policies import Tally
from alignkit.engine import Example, PackedBatch, collate
from alignkit.errors import AlignkitError

log = logging.getLogger(__name__)

_Placed = tuple[tuple[str, int], Example]
"""An example with the source and line it came from."""

Encode = Callable[[Source, Tally], Iterable[tuple[int, Example]]]


class ExampleStream(IterableDataset[PackedBatch]):
    """Yield packed batches from sources read over and over, in order, without end.

    Every rank reads all rows and encodes its own, each ``world_size``-th one, so ranks never
    wait for one another's data and none runs out. Nothing is cached: resuming encodes again
    what was seen before.

    Args:
        sources: The rows.
        encode: Turns a source's rows into examples.
        tokens_per_batch: Most tokens in one batch.
        rank: This process.
        world_size: Number of processes.
        skip: Batches to leave out at the start, already trained on.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        encode: Encode,
        *,
        tokens_per_batch: int,
        rank: int = 0,
        world_size: int = 1,
        skip: int = 0,
    ) -> None:
        self._sources = [shard(source, rank, world_size) for source in sources]
        self._encode = encode
        self._budget = tokens_per_batch
        self._skip = skip

    def __iter__(self) -> Iterator[PackedBatch]:
        for batch in islice(self._batches(), self._skip, None):
            yield collate([example for _, example in batch])

    def rows(self, number: int) -> list[tuple[str, int]]:
        """Return the source and line of each example of a batch, by reading the stream again."""
        return [place for place, _ in next(islice(self._batches(), number, None))]

    def _batches(self) -> Iterator[list[_Placed]]:
        batch: list[_Placed] = []
        tokens = 0
        for place, example in self._examples():
            if batch and tokens + example.num_tokens > self._budget:
                yield batch
                batch, tokens = [], 0
            batch.append((place, example))
            tokens += example.num_tokens

    def _examples(self) -> Iterator[_Placed]:
        while True:
            tally = Tally()
            for source in self._sources:
                for line, example in self._encode(source, tally):
                    yield (source.name, line), example
            if not tally.counts.get("examples"):
                names = ", ".join(source.name for source in self._sources)
                raise AlignkitError(f"{names}: the stream holds no example for every rank")
            log.info("read the stream to its end: %s", tally.counts)


def shard(source: Source, rank: int, world_size: int) -> Source:
    """Return each ``world_size``-th row of a source, from the ``rank``-th on."""

    def rows() -> Rows:
        return islice(source.rows(), (rank - 1) % world_size, None, world_size)

    return Source(source.name, source.digest, rows)


def head(source: Source, count: int) -> Source:
    """Return the first rows of a source."""
    return Source(source.name, f"{source.digest}:{count}", lambda: islice(source.rows(), count))


def tail(source: Source, count: int) -> Source:
    """Return a source without its first rows."""
    return Source(source.name, source.digest, lambda: islice(source.rows(), count, None))
