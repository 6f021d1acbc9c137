"""Define the preference losses that use no reference model: SimPO, AlphaPO and ORPO.

Shape letters and symbols: as in `alignkit.objectives.logistic`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from alignkit.objectives.logistic import bounded_expm1, smoothed
from alignkit.objectives.pairs import PairScores, PreferenceLoss


class _ReferenceFree(PreferenceLoss):
    """Define the rewards of losses over mean log-probabilities of the policy alone."""

    uses_reference: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Refuse a target margin that is no number."""
        super().__post_init__()
        if not math.isfinite(getattr(self, "gamma", 0.0)):
            self.refuse("gamma", "must be a number")

    def rewards(self, policy: PairScores, reference: PairScores) -> tuple[Tensor, Tensor]:
        """Return β log π(y|x)/|y| of both sides, [B] fp32 each (SimPO, equation 3)."""
        mean = policy.per_token()
        return self.beta * mean.chosen, self.beta * mean.rejected


@dataclass(frozen=True)
class SimPO(_ReferenceFree):
    """Compute the SimPO loss −log σ(β log π(y_w)/|y_w| − β log π(y_l)/|y_l| − γ).

    Meng et al. 2024, arXiv:2405.14734, equation 6.

    Args:
        beta: Scale of the mean log-probabilities; the paper takes 2 to 10.
        gamma: γ, the target margin; the paper takes about β/2.
        label_smoothing: ε.
    """

    beta: float = 2.0
    gamma: float = 1.0
    label_smoothing: float = 0.0

    def __call__(self, policy: PairScores, reference: PairScores) -> Tensor:
        return smoothed(self.margin(policy, reference) - self.gamma, self.label_smoothing)


@dataclass(frozen=True)
class AlphaPO(_ReferenceFree):
    """Compute the AlphaPO loss −log σ(β (R(y_w) − R(y_l)) − γ), R(y) = (1 − π(y)^{−α/|y|}) / α.

    Gupta et al. 2025, arXiv:2501.03884, equation 5: SimPO with another shape of reward, which is
    SimPO's for α → 0. The reference is not used.

    Args:
        beta: Scale of the rewards.
        alpha: α, not 0; the paper takes 0.1 to 0.25.
        gamma: γ, the margin asked for.
        label_smoothing: ε.
    """

    beta: float = 2.0
    alpha: float = 0.25
    gamma: float = 1.0
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        """Refuse the α at which there is no equation."""
        super().__post_init__()
        if not (math.isfinite(self.alpha) and self.alpha):
            self.refuse("alpha", "must be a number other than 0, at which it is SimPO")

    def __call__(self, policy: PairScores, reference: PairScores) -> Tensor:
        return smoothed(self.margin(policy, reference) - self.gamma, self.label_smoothing)

    def rewards(self, policy: PairScores, reference: PairScores) -> tuple[Tensor, Tensor]:
        """Return β R(y) of both sides, [B] each."""
        mean, scale = policy.per_token(), self.beta / self.alpha
        return (
            scale * -bounded_expm1(-self.alpha * mean.chosen),
            scale * -bounded_expm1(-self.alpha * mean.rejected),
        )


@dataclass(frozen=True)
class ORPO(_ReferenceFree):
    """Compute the ORPO loss −log p_w − β log σ(log p_w/(1−p_w) − log p_l/(1−p_l)).

    Hong et al. 2024, arXiv:2403.07691, equations 4, 6 and 7, with p = π(y)^{1/|y|}, the geometric
    mean over tokens.

    Args:
        beta: The paper's λ, the weight of the odds ratio beside the chosen cross-entropy.
    """

    beta: float = 0.1

    def __call__(self, policy: PairScores, reference: PairScores) -> Tensor:
        mean = policy.per_token()
        odds_B = mean.chosen - mean.rejected - _log1mexp(mean.chosen) + _log1mexp(mean.rejected)
        return -mean.chosen - self.beta * logsigmoid(odds_B)


def _log1mexp(logp_B: Tensor) -> Tensor:
    """Return log(1 − e^x) for x ≤ 0, finite also at x = 0, a response of probability 1."""
    return torch.log(-torch.expm1(logp_B.clamp(max=-1e-6)))
