"""Cross-entropy as a sum over tokens."""

from __future__ import annotations

from math import e, inf, log

import pytest
import torch

from alignkit.objectives.language import cross_entropy_sum, perplexity


def test_sum_of_negative_log_likelihoods() -> None:
    """Probabilities ½, ¼, ¼: ln 2 + ln 4 + ln 4 = 5 ln 2; every token pulls with weight −1."""
    logps = torch.tensor([0.5, 0.25, 0.25]).log().requires_grad_()
    loss = cross_entropy_sum(logps)
    loss.backward()
    assert loss.item() == pytest.approx(5 * log(2))
    assert logps.grad is not None and logps.grad.tolist() == [-1.0, -1.0, -1.0]


def test_perplexity_of_a_uniform_guess_is_the_vocabulary() -> None:
    assert perplexity(log(256)) == pytest.approx(256)
    assert perplexity(1.0) == pytest.approx(e)
    assert perplexity(1000.0) == inf
