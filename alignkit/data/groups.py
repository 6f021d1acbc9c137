"""Micro-batches that are drawn a group at a time and handed out one by one."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import cast

from torch.utils.data import DataLoader, Dataset, Sampler

from alignkit.data.samplers import TokenBudgetBatchSampler
from alignkit.data.store import ExampleSet
from alignkit.engine import Example
from alignkit.engine.group import Group, GroupedBatch


class GroupBatchSampler(Sampler[list[list[int]]]):
    """Yields the micro-batches of one rank in groups.

    A group begins at a multiple of its size, wherever in an epoch a run resumes: what a row's
    neighbours do to its rounding is then the same as in a run that was never stopped.

    Args:
        batches: Yields the micro-batches.
        size: Micro-batches of a group; an epoch's last may have fewer.
    """

    def __init__(self, batches: TokenBudgetBatchSampler, size: int) -> None:
        self.batches = batches
        self.size = size

    @property
    def sampler(self) -> TokenBudgetBatchSampler:
        """The micro-batches' sampler: where Lightning looks for ``set_epoch``."""
        return self.batches

    @property
    def skip(self) -> int:
        """Micro-batches of the first group that were trained on before this run."""
        return self.batches.start % self.size

    def __len__(self) -> int:
        return -(-len(self.batches) // self.size)

    def __iter__(self) -> Iterator[list[list[int]]]:
        batches = self.batches.batches_from(self.batches.start - self.skip)
        while group := list(islice(batches, self.size)):
            yield group


class MicroBatches(Dataset[list[Example]]):
    """The examples of a micro-batch, by the list of their indices."""

    def __init__(self, examples: ExampleSet) -> None:
        self._examples = examples

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, indices: list[int]) -> list[Example]:
        return [self._examples[index] for index in indices]


class GroupLoader(DataLoader[GroupedBatch]):
    """Loads groups with `collate_group` and yields their micro-batches.

    Its ``batch_sampler`` is a `GroupBatchSampler`, its dataset `MicroBatches`.
    """

    batch_sampler: GroupBatchSampler

    def __len__(self) -> int:
        return len(self.batch_sampler.batches)

    def __iter__(self) -> Iterator[GroupedBatch]:  # type: ignore[override]
        skip = self.batch_sampler.skip
        for group in cast(Iterator[Group], super().__iter__()):
            yield from group.batches(skip)
            skip = 0
