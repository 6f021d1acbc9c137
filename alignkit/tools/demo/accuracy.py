"""Measure how often a model prefers the chosen answer, without a reference."""

from __future__ import annotations

from pathlib import Path

import torch

from alignkit.data import HHPreferenceDataModule
from alignkit.engine import response_means, score
from alignkit.models.checkpoint import load_policy, policy_base


@torch.no_grad()
def preference_accuracy(checkpoint: str, pairs: Path, dtype: torch.dtype) -> float:
    """Return the share of test pairs whose chosen answer is likelier per token, in [0, 1].

    DPO's own accuracy compares a policy with its reference, and is undefined before training. This
    accuracy is defined for every model. It compares means of the tokens' log-probabilities, so that
    an answer's length does not decide.

    Args:
        checkpoint: A path that `load_policy` takes.
        pairs: A directory with ``train.jsonl`` and ``test.jsonl`` in HH-RLHF's format.
        dtype: Dtype of the base's weights.
    """
    model, _ = load_policy(checkpoint, dtype=dtype)
    data = HHPreferenceDataModule(policy_base(checkpoint), str(pairs), tokens_per_batch=2048)
    right = total = 0
    for batch in data.test_dataloader():
        chosen_B, rejected_B = response_means(score(model, batch), batch).view(-1, 2).unbind(1)
        right += int((chosen_B > rejected_B).sum())
        total += len(chosen_B)
    return right / total
