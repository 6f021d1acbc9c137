"""Define DPO under other divergences from the reference than the reverse KL.

Shape letters and symbols: as in `alignkit.objectives.logistic`; u = π(y|x)/π_ref(y|x).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import logsigmoid

from alignkit.objectives.logistic import bounded_expm1, smoothed
from alignkit.objectives.pairs import PairScores, PreferenceLoss


@dataclass(frozen=True)
class ForwardKLDPO(PreferenceLoss):
    """Compute f-DPO under the forward KL: −log σ(β (f'(u_w) − f'(u_l))) with f'(u) = 1 − 1/u.

    Wang et al. 2023, arXiv:2309.16240, table 1. The policy covers what the reference does: an
    answer that the policy has all but given up costs without bound.

    Args:
        beta: Strength of the tie to the reference.
        label_smoothing: ε.
    """

    beta: float = 0.1
    label_smoothing: float = 0.0

    def __call__(self, policy: PairScores, reference: PairScores) -> Tensor:
        return smoothed(self.margin(policy, reference), self.label_smoothing)

    def rewards(self, policy: PairScores, reference: PairScores) -> tuple[Tensor, Tensor]:
        """Return β f'(u) of both sides, [B] each (arXiv:2309.16240, theorem 1)."""
        chosen_B, rejected_B = log_ratios(policy, reference)
        return self.beta * -bounded_expm1(-chosen_B), self.beta * -bounded_expm1(-rejected_B)


@dataclass(frozen=True)
class JensenShannonDPO(PreferenceLoss):
    """Compute f-DPO under the Jensen–Shannon divergence: f'(u) = log(2u / (1 + u)).

    Wang et al. 2023, arXiv:2309.16240, table 1: rewards are at most β ln 2, so a chosen answer is
    not raised for ever.

    Args:
        beta: Strength of the tie to the reference.
        label_smoothing: ε.
    """

    beta: float = 0.1
    label_smoothing: float = 0.0

    def __call__(self, policy: PairScores, reference: PairScores) -> Tensor:
        return smoothed(self.margin(policy, reference), self.label_smoothing)

    def rewards(self, policy: PairScores, reference: PairScores) -> tuple[Tensor, Tensor]:
        """Return β f'(u) of both sides, [B] each; log(2u/(1+u)) is ln 2 + log σ(log u)."""
        chosen_B, rejected_B = log_ratios(policy, reference)
        return (
            self.beta * (math.log(2) + logsigmoid(chosen_B)),
            self.beta * (math.log(2) + logsigmoid(rejected_B)),
        )


@dataclass(frozen=True)
class AlphaDPO(PreferenceLoss):
    """Compute f-DPO under the α-divergence: f'(u) = (1 − u^{−α}) / α.

    Wang et al. 2023, arXiv:2309.16240, table 1: α → 0 is DPO, α = 1 the forward KL. TRL's
    ``f_alpha_divergence_coef`` is 1 − α.

    Args:
        beta: Strength of the tie to the reference.
        alpha: α, in (0, 1].
        label_smoothing: ε.
    """

    beta: float = 0.1
    alpha: float = 0.5
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        """Refuse an α outside its range."""
        super().__post_init__()
        if not 0 < self.alpha <= 1:
            self.refuse("alpha", "must lie in (0, 1]")

    def __call__(self, policy: PairScores, reference: PairScores) -> Tensor:
        return smoothed(self.margin(policy, reference), self.label_smoothing)

    def rewards(self, policy: PairScores, reference: PairScores) -> tuple[Tensor, Tensor]:
        """Return β f'(u) of both sides, [B] each."""
        scale = self.beta / self.alpha
        chosen_B, rejected_B = log_ratios(policy, reference)
        return (
            scale * -bounded_expm1(-self.alpha * chosen_B),
            scale * -bounded_expm1(-self.alpha * rejected_B),
        )


def log_ratios(policy: PairScores, reference: PairScores) -> tuple[Tensor, Tensor]:
    """Return log u, log π(y|x) − log π_ref(y|x), of both sides, [B] each."""
    return policy.chosen - reference.chosen, policy.rejected - reference.rejected
