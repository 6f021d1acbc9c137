"""Sum up scores: how often one answer is above the other, and how often at equal length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

_PRIOR = 0.01  # of both coefficients, so that they are finite where one side always wins
_ITERATIONS, _STRIDE = 200, 1.0


@dataclass(frozen=True)
class Verdict:
    """Hold how a file's answers were scored.

    Example:
        >>> Verdict.of([0.5, -0.25])
        Verdict(rows=2, accuracy=0.5, error=0.5, margin=0.125)

    Attributes:
        rows: How many rows were scored.
        accuracy: The share whose first answer has a higher score than their last; a tie is a half.
        error: Its standard error; NaN for one row.
        margin: The mean difference of the two scores.
    """

    rows: int
    accuracy: float
    error: float
    margin: float

    @classmethod
    def of(cls, margins: Sequence[float]) -> Verdict:
        """Sum up the differences of two scores of each row, one row at least."""
        values = torch.tensor(margins, dtype=torch.float64)
        credit = (values.sign() + 1) / 2
        error = (credit.var() / len(credit)).sqrt().item() if len(credit) > 1 else float("nan")
        return cls(len(credit), credit.mean().item(), error, values.mean().item())


def at_equal_length(margins: Sequence[float], longer: Sequence[float]) -> tuple[float, float]:
    r"""Return the share of rows that one side would win with answers as long as the other's.

    The win is regressed on the difference in length Δ, whose root mean square is s,
    :math:`P(\text{win}) = \sigma(\theta + \phi \tanh(\Delta / s))`, and taken at Δ = 0: σ(θ).
    Dubois et al. 2024, arXiv:2404.04475, equation 2, without the term for each prompt, which takes
    answers of many models. A weak prior (a penalty of 0.005 on the square of either coefficient)
    keeps both finite where one side always wins. A tie counts as half a win and half a loss, which
    makes the error too large where there are many.

    Example:
        >>> share, error = at_equal_length([1.0, -1.0, 1.0, -1.0], [5.0, -5.0, 5.0, -5.0])
        >>> round(share, 3), error > 0.1
        (0.5, True)

    Args:
        margins: The differences of the scores; a tie is half a win.
        longer: The differences of the lengths, in one unit or another.

    Returns:
        The share, and its standard error by the delta method.
    """
    wins_N = (torch.tensor(margins, dtype=torch.float64).sign() + 1) / 2
    difference_N = torch.tensor(longer, dtype=torch.float64)
    spread = difference_N.square().mean().sqrt() if len(longer) else difference_N.sum()
    slope_N = torch.tanh(difference_N / spread) if spread > 0 else torch.zeros_like(difference_N)
    inputs_N2 = torch.stack((torch.ones_like(slope_N), slope_N), dim=1)
    weights_2 = torch.zeros(2, dtype=torch.float64)
    prior_22 = _PRIOR * torch.eye(2, dtype=torch.float64)
    for _ in range(_ITERATIONS):
        chance_N = torch.sigmoid(inputs_N2 @ weights_2)
        slope_2 = inputs_N2.T @ (chance_N - wins_N) + _PRIOR * weights_2
        curve_22 = inputs_N2.T @ (inputs_N2 * (chance_N * (1 - chance_N))[:, None]) + prior_22
        stride_2 = torch.linalg.solve(curve_22, slope_2)
        weights_2 = weights_2 - stride_2 * min(
            1.0, _STRIDE / max(stride_2.abs().max().item(), 1e-9)
        )
    share = torch.sigmoid(weights_2[0]).item()
    return share, share * (1 - share) * torch.linalg.inv(curve_22)[0, 0].sqrt().item()
