"""Take from a run what its answers are judged by: its reference, and its loss or its β.

Shape letters: N scored tokens, R responses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from alignkit.batch import PackedBatch
from alignkit.engine import Example, response_lengths
from alignkit.errors import AlignkitError
from alignkit.modules.pair_scores import token_weights
from alignkit.objectives.preference import PairScores, PreferenceLoss


class Trained(NamedTuple):
    """Hold what a run was trained against and by.

    Example:
        >>> Trained("base", beta=0.3).loss is None
        True

    Attributes:
        reference: Its reference, if that is not the base alone.
        beta: β of a loss that is not known here: KTO's, or one's own that is not imported.
        loss: The loss, whose rewards are those that the run logged.
    """

    reference: str | None = None
    beta: float | None = None
    loss: PreferenceLoss | None = None


def trained_with(settings: Mapping[str, Any]) -> Trained:
    """Return what hyper-parameters say; nothing of other stages, or of a loss with no reference."""
    values, named = settings.get("loss"), settings.get("reference")
    if not isinstance(values, Mapping) or "reference" not in settings or named == "none":
        return Trained()
    loss = None
    if "class_path" in values:
        try:
            loss = PreferenceLoss.from_dict(values)
        except (AlignkitError, TypeError):  # one's own, which is not imported here or has changed
            values = values.get("init_args") or {}
            # The rewards of a sum are those of its first term, and WPO's those of the loss inside.
            while inside := (values.get("terms") or [values.get("of")])[0]:
                values = inside.get("init_args") or {}
    if loss is not None and not loss.uses_reference:
        return Trained()
    if named in (None, "copy"):  # of the policy as it started
        named = settings.get("init_from")
    if named in (None, "base"):  # a whole model has no adapters to take off
        named = settings["base"] if settings.get("lora") is None else None
    return Trained(named, values.get("beta") if loss is None else None, loss)


def weights_of(loss: PreferenceLoss, batch: PackedBatch, examples: Sequence[Example]) -> Tensor:
    """Return the loss's weight of each scored token, [N] fp32.

    In training an answer's weights depend on the pair's other one; of more answers it is the
    shortest other one, and an answer alone is its own.
    """
    others = []
    lengths = iter(response_lengths(batch).tolist())
    for example in examples:
        own = [next(lengths) for _ in example.responses]
        others += [min(own[:i] + own[i + 1 :], default=own[i]) for i in range(len(own))]
    return token_weights(batch, loss, torch.tensor(others, device=batch.input_ids.device))


def rewards_of(loss: PreferenceLoss, ours_R: Tensor, theirs_R: Tensor, lengths_R: Tensor) -> Tensor:
    """Return the loss's reward of each answer, [R], of any number to a prompt."""
    # A reward is that of one answer, so that either side of a pair may stand for the other.
    policy, reference = (PairScores(s, s, lengths_R, lengths_R) for s in (ours_R, theirs_R))
    return loss.rewards(policy, reference)[0]
