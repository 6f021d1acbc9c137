"""Micro-batches that are also laid out together, in one longer row.

What keeps no activations, a reference under inference mode, can take more tokens at once than the
policy whose micro-batches these are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import accumulate, chain

from alignkit.engine.batch import Example, PackedBatch, collate


@dataclass(frozen=True)
class GroupedBatch(PackedBatch):
    """A micro-batch and its place in a group.

    Attributes:
        first_R: The group's responses that lie before this batch's.
        group: The whole group as one row, its micro-batches in order. It comes with the first of
            them that is trained on, ``None`` with the others.
    """

    first_R: int
    group: PackedBatch | None = None


@dataclass(frozen=True)
class Group:
    """Consecutive micro-batches and the row of them all."""

    row: PackedBatch
    members: list[PackedBatch]

    def pin_memory(self) -> Group:
        """Return the group in page-locked memory."""
        return Group(self.row.pin_memory(), [batch.pin_memory() for batch in self.members])

    def batches(self, skip: int = 0) -> Iterator[GroupedBatch]:
        """The micro-batches after the first ``skip``, the first of these with the row."""
        firsts = [0, *accumulate(batch.num_responses for batch in self.members)]
        for number, batch in enumerate(self.members[skip:], skip):
            values = {field.name: getattr(batch, field.name) for field in fields(PackedBatch)}
            row = self.row if number == skip else None
            yield GroupedBatch(**values, first_R=firsts[number], group=row)


def collate_group(micro_batches: Sequence[Sequence[Example]]) -> Group:
    """Lay out every micro-batch on its own, and all of them in one row.

    Raises:
        AlignkitError: As `collate`.
    """
    row = collate(list(chain.from_iterable(micro_batches)))
    return Group(row, [collate(examples) for examples in micro_batches])
