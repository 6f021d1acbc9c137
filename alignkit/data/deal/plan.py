"""Compute an epoch's plan: an order of examples, cut into steps and dealt to micro-batches."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

import numpy as np
from numpy.typing import NDArray

from alignkit.errors import AlignkitError

_ATTEMPTS = 64

Cuts = tuple[NDArray[np.int64], list[int]]
"""An order of examples and the bounds of its steps."""


@dataclass(frozen=True)
class Planner:
    """Compute plans of epochs for some ranks, the same on each of them.

    Example:
        >>> sizes = np.array([5, 4, 3, 3, 3])
        >>> planner = Planner(sizes, [(5, 5)], 10, world_size=2, shuffle=False)
        >>> order, cuts = planner.of_epoch(0)
        >>> planner.deal(order[cuts[0] : cuts[1]], bins=2)
        [[0, 3], [1, 2, 4]]

    Attributes:
        sizes: [E] tokens of each example, at most ``tokens_per_batch``: a longer one fills a
            micro-batch of its own.
        quotas: See `TokenBudgetBatchSampler`, as for every attribute below.
    """

    sizes: NDArray[np.int64]
    quotas: Sequence[tuple[int, int]]
    tokens_per_batch: int
    examples_per_batch: int | None = None
    shuffle: bool = True
    seed: int = 0
    world_size: int = 1
    accumulate: int = 1
    equal: bool = True

    def __post_init__(self) -> None:
        drawn = sum(quota for _, quota in self.quotas)
        bins = self.world_size * self.accumulate
        if self.tokens_per_batch < 1:
            raise AlignkitError(f"tokens_per_batch={self.tokens_per_batch}: give at least 1")
        if drawn < self.world_size:
            raise AlignkitError(
                f"{drawn} examples cannot be dealt to {self.world_size} ranks; "
                "give more data or use fewer devices"
            )
        if self.examples_per_batch is not None and self.examples_per_batch < bins:
            raise AlignkitError(
                f"examples_per_batch={self.examples_per_batch}: an optimizer step has "
                f"{self.world_size} ranks of {self.accumulate} micro-batches, so give at least "
                f"{bins}"
            )

    @cached_property
    def steps(self) -> int:
        """Count the steps of every epoch, as many as epoch 0 has."""
        return len(self.of_epoch(0)[1]) - 1

    @cached_property
    def _last(self) -> int:
        cuts = self.of_epoch(0)[1]
        return self.micro_batches(cuts[-1] - cuts[-2])

    def micro_batches(self, examples: int) -> int:
        """Count a step's micro-batches, fewer than usual where the epoch has too few examples."""
        return max(1, min(self.accumulate, examples // self.world_size))

    def of_epoch(self, epoch: int) -> Cuts:
        """Draw an order and the bounds of its steps, with as many micro-batches as epoch 0 has.

        Where no draw has as many, the steps of epoch 0 come in a new order.
        """
        for attempt in range(_ATTEMPTS if epoch else 1):
            order = self._draw(epoch, attempt)
            cuts = self.cut(order)
            if epoch == 0 or self._even_out(order, cuts):
                return order, cuts
        order, cuts = self.of_epoch(0)
        steps = [order[first:last] for first, last in pairwise(cuts)]
        # The last step stays the last, as it may be short.
        moved = np.random.default_rng([self.seed, epoch]).permutation(len(steps) - 1)
        if (np.diff(moved) == 1).all():  # nothing has moved
            moved = np.roll(moved, 1)
        steps = [*(steps[number] for number in moved.tolist()), steps[-1]]
        return np.concatenate(steps), [*accumulate(map(len, steps), initial=0)]

    def _draw(self, epoch: int, attempt: int) -> NDArray[np.int64]:
        parts = []
        first = 0
        rng = np.random.default_rng([self.seed, epoch, attempt])
        for size, drawn in self.quotas:
            part = rng.permutation(size) if self.shuffle else np.arange(size)
            parts.append(part[:drawn] + first)
            first += size
        order = np.concatenate(parts)
        if self.shuffle and len(parts) > 1:
            rng.shuffle(order)
        return order.astype(np.int64)

    def cut(self, order: NDArray[np.int64]) -> list[int]:
        """Split an order greedily into steps."""
        bins = self.world_size * self.accumulate
        if self.examples_per_batch is not None:
            cuts = [*range(0, len(order), self.examples_per_batch), len(order)]
            too_few = len(cuts) > 2 and cuts[-1] - cuts[-2] < self.world_size
            return cuts[:-1] if too_few and self.equal else cuts
        ends = np.concatenate([[0], np.cumsum(self.sizes[order])])
        cuts = [0]
        while cuts[-1] < len(order):
            start = cuts[-1]
            limit = ends[start] + bins * self.tokens_per_batch
            end = int(np.searchsorted(ends, limit, side="right")) - 1
            while not self._fits(order[start:end]):
                end -= 1
            cuts.append(end)
        return self._mend_tail(order, cuts) if self.equal else cuts

    def _mend_tail(self, order: NDArray[np.int64], cuts: list[int]) -> list[int]:
        """Give every micro-batch of the last step an example, or the step fewer micro-batches.

        What is no multiple of the ranks is left out then.
        """
        bins = self.world_size * self.accumulate
        if cuts[-1] - cuts[-2] >= bins:
            return cuts
        middle = cuts[-1] - bins
        enough = len(cuts) > 2 and middle - cuts[-3] >= bins
        if enough and self._fits(order[cuts[-3] : middle]):
            return [*cuts[:-2], middle, cuts[-1]]
        end = cuts[-1] - (cuts[-1] - cuts[-2]) % self.world_size
        return [*cuts[:-1], end] if end > cuts[-2] else cuts[:-1]

    def _even_out(self, order: NDArray[np.int64], cuts: list[int]) -> bool:
        """Split the fullest steps until there are as many as in epoch 0; False if that fails.

        The last step must have as many micro-batches, too.
        """
        bins = self.world_size * self.accumulate
        if len(cuts) - 1 > self.steps:
            return False
        while len(cuts) - 1 < self.steps:
            counts = np.diff(cuts)
            step = int(np.argmax(counts))
            middle = cuts[step] + int(counts[step]) // 2
            halves = (order[cuts[step] : middle], order[middle : cuts[step + 1]])
            if counts[step] < 2 * bins or not all(self._fits(half) for half in halves):
                return False
            cuts.insert(step + 1, middle)
        return self.micro_batches(cuts[-1] - cuts[-2]) == self._last

    def _fits(self, members: NDArray[np.int64]) -> bool:
        bins = self.world_size * self.accumulate
        if bins == 1 or len(members) <= bins:
            return True
        loads = [int(self.sizes[batch].sum()) for batch in self.deal(members, bins)]
        return max(loads) <= self.tokens_per_batch

    def deal(self, members: NDArray[np.int64], bins: int) -> list[list[int]]:
        """Divide examples among ``bins`` micro-batches, the longest first to the lightest."""
        if bins == 1:
            return [members.tolist()]
        sizes = self.sizes[members]
        dealt: list[list[int]] = [[] for _ in range(bins)]
        loads = [(0, number) for number in range(bins)]
        for index in np.argsort(-sizes, kind="stable").tolist():
            load, number = loads[0]
            heapq.heapreplace(loads, (load + int(sizes[index]), number))
            dealt[number].append(int(members[index]))
        return dealt
