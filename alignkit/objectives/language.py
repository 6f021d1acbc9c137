"""Compute the cross-entropy that language modelling and SFT minimise.

Shape letters: N scored tokens.
"""

from __future__ import annotations

import math

from torch import Tensor


def cross_entropy_sum(token_logps_N: Tensor) -> Tensor:
    """Sum the negative log-likelihood of the scored tokens.

    ``L = − Σ_n log π(x_n | x_<n)``. The result is a sum, because the optimizer step divides by the
    number of tokens of all micro-batches and ranks, which this function does not know.

    Args:
        token_logps_N: [N] fp32, log π of each scored token, as ``engine.score`` returns them.

    Returns:
        Scalar fp32 in nats.
    """
    return -token_logps_N.sum()


def perplexity(mean_cross_entropy: float) -> float:
    """Return ``exp`` of a mean cross-entropy in nats per token, infinity where it overflows."""
    return math.exp(mean_cross_entropy) if mean_cross_entropy < 709.0 else math.inf
