"""Define the preference losses that aim at a margin of a fixed size: SLiC, IPO and SPPO.

Shape letters and symbols: as in `alignkit.objectives.logistic`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from alignkit.objectives.pairs import PairScores, PreferenceLoss


@dataclass(frozen=True)
class Hinge(PreferenceLoss):
    """Compute the hinge loss max(0, 1 − βΔ), which is SLiC on log-ratios.

    Zhao et al. 2023, arXiv:2305.10425, section 2, on log-ratios instead of log-probabilities as
    in Liu et al. 2023 (RSO), arXiv:2309.06657.

    Args:
        beta: 1/β is the margin of log-ratios, in nats, from which a pair's loss is 0.
    """

    beta: float = 0.1
    trl_name: ClassVar[str | None] = "hinge"

    def __call__(self, policy: PairScores, reference: PairScores) -> Tensor:
        return torch.relu(1 - self.margin(policy, reference))


@dataclass(frozen=True)
class IPO(PreferenceLoss):
    """Compute the IPO loss (r(y_w)/|y_w| − r(y_l)/|y_l| − 1/(2β))².

    Azar et al. 2023, arXiv:2310.12036, equation 17, where β is called τ. Log-ratios are means over
    tokens, as the authors train it, so that the target 1/(2β) does not depend on length.

    Args:
        beta: τ; the target margin is 1/(2τ).
        per_token: Whether log-ratios are means over tokens; ``False`` is the paper's equation as it
            stands, (Δ − 1/(2β))² of sums.
    """

    beta: float = 0.1
    per_token: bool = True
    trl_name: ClassVar[str | None] = "ipo"

    def __call__(self, policy: PairScores, reference: PairScores) -> Tensor:
        return ((self.margin(policy, reference) - 0.5) / self.beta).square()

    def rewards(self, policy: PairScores, reference: PairScores) -> tuple[Tensor, Tensor]:
        """Return β r(y)/|y| of both sides, or β r(y) for log-ratios of sums, [B] fp32 each."""
        if self.per_token:
            policy, reference = policy.per_token(), reference.per_token()
        return super().rewards(policy, reference)


@dataclass(frozen=True)
class SPPO(PreferenceLoss):
    """Compute the SPPO loss with hard labels, (r(y_w) − 1/(2β))² + (r(y_l) + 1/(2β))².

    Wu et al. 2024, arXiv:2405.00675, equation 4.7 with P(y_w ≻ y_l) = 1 and η = 1/β.

    Args:
        beta: 1/η; the paper's η is 1,000, for log-ratios of up to hundreds of nats.
    """

    beta: float = 0.001
    trl_name: ClassVar[str | None] = "sppo_hard"

    def __call__(self, policy: PairScores, reference: PairScores) -> Tensor:
        chosen_B = policy.chosen - reference.chosen
        rejected_B = policy.rejected - reference.rejected
        target = 0.5 / self.beta
        return (chosen_B - target).square() + (rejected_B + target).square()
