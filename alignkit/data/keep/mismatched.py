"""Give each example of a set an answer of another one, to a prompt that it does not answer."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from alignkit.data.keep.store import ExampleSet
from alignkit.engine import Example
from alignkit.errors import AlignkitError


class MismatchedSet(ExampleSet):
    """Hold examples of one answer with a second one, that of an example with another prompt.

    It is the example half the set away, as rows of one prompt mostly stand together, or the next
    one after it whose prompt differs: files that hold all good answers before all bad ones have the
    same prompt there.

    Args:
        examples: Examples of one answer each.
        max_length: Most tokens of a prompt with one answer; the second one is cut to it.
        name: Names the set in messages.

    Raises:
        AlignkitError: There is one example alone, or all have the same prompt.
    """

    def __init__(self, examples: ExampleSet, max_length: int, name: str) -> None:
        super().__init__(examples._stores, examples._chosen)
        self._max_length = max_length
        digests = [s.prompt_digests(c) for s, c in zip(self._stores, self._chosen, strict=True)]
        self._others = _others(np.concatenate(digests))
        if len(self._others) < len(self):
            held = "one row" if len(self) == 1 else "one prompt alone"
            raise AlignkitError(
                f"data.path: the {name} split holds {held}; mismatched answers need two or more "
                "(data.val_fraction sets rows apart)"
            )

    def __getitem__(self, index: int) -> Example:
        own = super().__getitem__(index)
        other = super().__getitem__(int(self._others[index]))
        room = self._max_length - len(own.prompt)
        return Example(own.prompt, [*own.responses, other.responses[0][:room]], label=own.label)

    @property
    def answers(self) -> NDArray[np.int64]:
        """Return how many responses each example has, the mismatched one counted, [E] int64."""
        return super().answers + 1

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Return the tokens of each example, its prompt once and both answers, [E] int64."""
        whole = super().lengths
        parts = [s.prompt_lengths[c] for s, c in zip(self._stores, self._chosen, strict=True)]
        prompts = np.concatenate(parts)
        others = (whole - prompts)[self._others]
        lengths: NDArray[np.int64] = whole + np.minimum(others, self._max_length - prompts)
        return lengths


def _others(prompts: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Return for each example one with another prompt, [E] int64, or nothing where there is none.

    Args:
        prompts: A digest of each example's prompt, [E].
    """
    rows = len(prompts)
    ends = np.flatnonzero(prompts != np.roll(prompts, -1))  # of runs of one prompt
    if not len(ends):
        return np.zeros(0, np.int64)
    half = (np.arange(rows) + rows // 2) % rows
    end_of_run = ends[np.searchsorted(ends, half) % len(ends)]
    others: NDArray[np.int64] = np.where(prompts[half] != prompts, half, (end_of_run + 1) % rows)
    return others
