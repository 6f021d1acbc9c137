"""Give each example of a set an answer of another one, to a prompt that it does not answer."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from alignkit.data.keep.store import ExampleSet
from alignkit.engine import Example
from alignkit.errors import AlignkitError


class MismatchedSet(ExampleSet):
    """Hold examples of one answer with a second one, that of the example half the set away.

    Rows of one prompt mostly stand together, so that neighbours would lend each other answers to
    the same prompt.

    Args:
        examples: Examples of one answer each.
        max_length: Most tokens of a prompt with one answer; the second one is cut to it.
        name: Names the set in messages.

    Raises:
        AlignkitError: There is one example alone.
    """

    def __init__(self, examples: ExampleSet, max_length: int, name: str) -> None:
        super().__init__(examples._stores, examples._chosen)
        if len(self) == 1:
            raise AlignkitError(
                f"data.path: the {name} split holds one row; mismatched answers need two or more "
                "(data.val_fraction sets rows apart)"
            )
        self._max_length = max_length

    def __getitem__(self, index: int) -> Example:
        own = super().__getitem__(index)
        other = super().__getitem__((index + len(self) // 2) % len(self))
        room = self._max_length - len(own.prompt)
        return Example(own.prompt, [*own.responses, other.responses[0][:room]], label=own.label)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Return the tokens of each example, its prompt once and both answers, [E] int64."""
        whole = super().lengths
        parts = [s.prompt_lengths[c] for s, c in zip(self._stores, self._chosen, strict=True)]
        prompts = np.concatenate(parts)
        others = np.roll(whole - prompts, -(len(self) // 2))
        lengths: NDArray[np.int64] = whole + np.minimum(others, self._max_length - prompts)
        return lengths
