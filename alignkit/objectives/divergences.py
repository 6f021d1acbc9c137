"""Define DPO under other divergences from the reference than the reverse KL.

Shape letters and symbols: as in `alignkit.objectives.logistic`; u = π(y|x)/π_ref(y|x).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import logsigmoid

from alignkit.objectives.logistic import bounded_expm1, smoothed
from alignkit.objectives.pairs import PairScores, PreferenceLoss


class _DivergenceDPO(PreferenceLoss):
    """Compute −log σ(β (f'(u_w) − f'(u_l))) for a divergence that a subclass defines by its f'."""

    label_smoothing: float

    def __call__(self, policy: PairScores, reference: PairScores) -> Tensor:
        return smoothed(self.margin(policy, reference), self.label_smoothing)

    def rewards(self, policy: PairScores, reference: PairScores) -> tuple[Tensor, Tensor]:
        """Return β f'(u) of both sides, [B] each (arXiv:2309.16240, theorem 1)."""
        return (
            self.beta * self.derivative(policy.chosen - reference.chosen),
            self.beta * self.derivative(policy.rejected - reference.rejected),
        )

    @abstractmethod
    def derivative(self, log_u_B: Tensor) -> Tensor:
        """Return f'(u), [B], of log u = log π(y|x) − log π_ref(y|x)."""


@dataclass(frozen=True)
class ForwardKLDPO(_DivergenceDPO):
    """Compute f-DPO under the forward KL: −log σ(β (f'(u_w) − f'(u_l))) with f'(u) = 1 − 1/u.

    Wang et al. 2023, arXiv:2309.16240, table 1. The policy covers what the reference does: an
    answer that the policy has all but given up costs without bound, until 80 nats below the
    reference: beyond that it has no gradient any more.

    Args:
        beta: Strength of the tie to the reference.
        label_smoothing: ε.

    Example:
        >>> import torch
        >>> ForwardKLDPO().derivative(torch.tensor([0.0])).item()
        0.0
    """

    beta: float = 0.1
    label_smoothing: float = 0.0

    def derivative(self, log_u_B: Tensor) -> Tensor:
        """Return 1 − 1/u, [B]."""
        return -bounded_expm1(-log_u_B)


@dataclass(frozen=True)
class JensenShannonDPO(_DivergenceDPO):
    """Compute f-DPO under the Jensen–Shannon divergence: f'(u) = log(2u / (1 + u)).

    Wang et al. 2023, arXiv:2309.16240, table 1: rewards are at most β ln 2, so a chosen answer is
    not raised for ever.

    Args:
        beta: Strength of the tie to the reference.
        label_smoothing: ε.

    Example:
        >>> import torch
        >>> JensenShannonDPO().derivative(torch.tensor([0.0])).item()
        0.0
    """

    beta: float = 0.1
    label_smoothing: float = 0.0

    def derivative(self, log_u_B: Tensor) -> Tensor:
        """Return log(2u/(1+u)) = ln 2 + log σ(log u), [B]."""
        return math.log(2) + logsigmoid(log_u_B)


@dataclass(frozen=True)
class AlphaDPO(_DivergenceDPO):
    """Compute f-DPO under the α-divergence: f'(u) = (1 − u^{−α}) / α.

    Wang et al. 2023, arXiv:2309.16240, table 1: α → 0 is DPO, α = 1 the forward KL. TRL's
    ``f_alpha_divergence_coef`` is 1 − α. An answer more than 80/α nats below the reference has no
    gradient any more.

    Args:
        beta: Strength of the tie to the reference.
        alpha: α, in (0, 1].
        label_smoothing: ε.

    Example:
        >>> import torch
        >>> AlphaDPO(alpha=1.0).derivative(torch.tensor([2.0]).log()).item()
        0.5
    """

    beta: float = 0.1
    alpha: float = 0.5
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        """Refuse an α outside its range."""
        super().__post_init__()
        if not 0 < self.alpha <= 1:
            self.refuse("alpha", "must lie in (0, 1]")

    def derivative(self, log_u_B: Tensor) -> Tensor:
        """Return (1 − u^{−α}) / α, [B]."""
        return -bounded_expm1(-self.alpha * log_u_B) / self.alpha
