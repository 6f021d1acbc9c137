"""Keep from loaders how many examples a set has."""

from __future__ import annotations

from torch.utils.data import Dataset

from alignkit.data.keep.store import ExampleSet
from alignkit.engine import Example


class Unsized(Dataset[Example]):
    """Hold examples without a length, so that no loader can ask for one."""

    def __init__(self, examples: ExampleSet) -> None:
        self._examples = examples

    def __getitem__(self, index: int) -> Example:
        return self._examples[index]
