"""Refuse answers that an objective does not take: in number or in kind, before a run or in it."""

from __future__ import annotations

from collections.abc import Iterable
from math import inf
from typing import Any, NamedTuple

import numpy as np
from lightning.pytorch import LightningModule

from alignkit.batch import PackedBatch
from alignkit.data.base import AlignmentDataModule
from alignkit.data.dialogues import PreferenceDataModule, UnpairedDataModule
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
        AlignkitError: A loss over pairs met one answer or three, a loss over ranks only one, or
            answers have labels.
    """
    if batch.labels is not None:
        raise _unpaired(loss)
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
        AlignkitError: A row has another number of answers; the message says where it is. Or the
            data are unpaired.
    """
    if isinstance(data, UnpairedDataModule):
        raise _unpaired(loss)
    least, most, rule = _counts_of(loss)
    sets = data._sets if isinstance(data, AlignmentDataModule) else {}
    for examples in (sets[split] for split in splits if split in sets):
        counts = examples.answers
        wrong = np.flatnonzero((counts < least) | (counts > most))
        if len(wrong):
            source, line = examples.place(int(wrong[0]))
            raise AlignkitError(f"{source}:{line}: has {counts[wrong[0]]} answers: {rule}")


def refuse_rejected_answers(module: LightningModule) -> None:
    """Refuse a data module whose answers are not all to be imitated.

    Args:
        module: What imitates every answer; it has a trainer.

    Raises:
        AlignkitError: Some are rejected ones, or answers to other prompts.
    """
    data = getattr(module.trainer, "datamodule", None)
    if isinstance(data, (PreferenceDataModule, UnpairedDataModule)) and reads_as_we_do(module):
        raise AlignkitError(
            f"data: {type(module).__name__} imitates every answer, and {type(data).__name__} has "
            "rejected or mismatched ones; use SFTDataModule, which takes the chosen ones"
        )


def reads_as_we_do(module: LightningModule) -> bool:
    """Tell whether a module reads its batches by alignkit's code, not by that of a subclass."""
    own = (getattr(type(module), name, None) for name in ("compute_loss", "scores"))
    return all(each is None or each.__module__.startswith("alignkit.") for each in own)


def _unpaired(loss: PreferenceLoss | BradleyTerry) -> AlignkitError:
    return AlignkitError(
        f"data: {type(loss).__name__} compares the answers to a prompt, and UnpairedDataModule "
        "gives each with a label and an answer to another prompt; use PreferenceDataModule, or "
        "train with KTOModule"
    )


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
