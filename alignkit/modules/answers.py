"""Refuse rows with another number of answers than a loss takes, before a run or in a batch."""

from __future__ import annotations

from collections.abc import Iterable
from math import inf
from typing import Any, NamedTuple

import numpy as np

from alignkit.batch import PackedBatch
from alignkit.data.base import AlignmentDataModule
from alignkit.errors import AlignkitError
from alignkit.objectives.pairs import PreferenceLoss
from alignkit.objectives.reward import BradleyTerry


class _Counts(NamedTuple):
    least: int
    most: float
    rule: str


def refuse_other_counts(batch: PackedBatch, loss: PreferenceLoss | BradleyTerry) -> None:
    """Refuse a batch whose prompts have not the number of answers that a loss takes.

    Raises:
        AlignkitError: A loss over pairs met one answer or three, a loss over ranks only one.
    """
    least, most, rule = _counts_of(loss)
    if not all(least <= len(span.responses) <= most for span in batch.spans):
        raise AlignkitError(f"data: {rule}")


def refuse_rows_with_other_counts(
    data: Any, splits: Iterable[str], loss: PreferenceLoss | BradleyTerry
) -> None:
    """Refuse rows of a data module at which a run would fail in its middle.

    Args:
        data: A data module that is set up; what is none of alignkit's is passed over.
        splits: Those that are read.
        loss: What is trained or measured.

    Raises:
        AlignkitError: A row has another number of answers; the message says where it is.
    """
    least, most, rule = _counts_of(loss)
    sets = data._sets if isinstance(data, AlignmentDataModule) else {}
    for examples in (sets[split] for split in splits if split in sets):
        counts = examples.answers
        wrong = np.flatnonzero((counts < least) | (counts > most))
        if len(wrong):
            source, line = examples.place(int(wrong[0]))
            raise AlignkitError(f"{source}:{line}: has {counts[wrong[0]]} answers: {rule}")


def _counts_of(loss: PreferenceLoss | BradleyTerry) -> _Counts:
    name = type(loss).__name__
    if isinstance(loss, BradleyTerry):
        return _Counts(
            2,
            2 if loss.margin else inf,
            "a reward model needs two answers a prompt or more, the best first, and with "
            "model.loss.margin exactly two; use PreferenceDataModule",
        )
    if loss.ranks:
        return _Counts(
            2,
            inf,
            f"{name} needs two responses a prompt or more, the best first; use "
            "PreferenceDataModule",
        )
    return _Counts(
        2,
        2,
        f"{name} needs exactly two responses a prompt, chosen before rejected; use "
        "PreferenceDataModule on pairs, or the loss PlackettLuce for more",
    )
