"""Define the preference losses with a term for the chosen answer's likelihood: RPO, DPOP, CPO.

DPO asks for a margin, which also grows while both answers become less likely. These add a term that
keeps the chosen answer. Shape letters and symbols: as in `alignkit.objectives.logistic`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from alignkit.objectives.logistic import smoothed
from alignkit.objectives.pairs import PairScores, PreferenceLoss


@dataclass(frozen=True)
class ChosenNLL(PreferenceLoss):
    """Compute the cross-entropy −log π(y_w)/|y_w| of the chosen answers: SFT's term.

    Neither the reference nor the rejected answers are used.

    A term for `WeightedSum`. Every answer counts alike, whatever its length: TRL's ``sft`` is the
    mean over a batch's tokens, which weighs an answer by its length and by what it is batched with.
    """

    uses_reference: ClassVar[bool] = False
    positive: ClassVar[tuple[str, ...]] = ()

    def __call__(self, policy: PairScores, reference: PairScores) -> Tensor:
        return -policy.per_token().chosen

    def rewards(self, policy: PairScores, reference: PairScores) -> tuple[Tensor, Tensor]:
        """Return log π(y|x)/|y| of both sides, [B] each."""
        mean = policy.per_token()
        return mean.chosen, mean.rejected


@dataclass(frozen=True)
class RPO(PreferenceLoss):
    """Compute the RPO loss −log σ(βΔ) − α log π(y_w)/|y_w|: DPO with SFT's term.

    Pang et al. 2024, arXiv:2404.19733, equation 1, with the prompt left out of the length.

    Args:
        beta: Strength of the tie to the reference.
        alpha: α, the weight of SFT's term; 0 is DPO.
        label_smoothing: ε, of DPO's term.
    """

    beta: float = 0.1
    alpha: float = 1.0
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        """Refuse a weight that would push chosen answers down."""
        super().__post_init__()
        self.at_least_zero("alpha")

    def __call__(self, policy: PairScores, reference: PairScores) -> Tensor:
        margin_B = self.margin(policy, reference)
        return smoothed(margin_B, self.label_smoothing) - self.alpha * policy.per_token().chosen


@dataclass(frozen=True)
class DPOP(PreferenceLoss):
    """Compute the DPO-positive loss −log σ(β (Δ − λ max(0, −r(y_w)))).

    A chosen answer that became less likely is paid for.

    Pal et al. 2024 (Smaug), arXiv:2402.13228, equation 3.

    Args:
        beta: Strength of the tie to the reference; the paper takes 0.3.
        penalty: λ; the paper takes 50, 5 where answers differ in few tokens; 0 is DPO.
        label_smoothing: ε.
    """

    beta: float = 0.3
    penalty: float = 50.0
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        """Refuse a penalty that rewards a chosen answer that fell."""
        super().__post_init__()
        self.at_least_zero("penalty")

    def __call__(self, policy: PairScores, reference: PairScores) -> Tensor:
        fallen_B = torch.relu(reference.chosen - policy.chosen)
        margin_B = self.margin(policy, reference) - self.beta * self.penalty * fallen_B
        return smoothed(margin_B, self.label_smoothing)


@dataclass(frozen=True)
class CPO(PreferenceLoss):
    """Compute the CPO loss −log σ(β (log π(y_w) − log π(y_l))) − λ log π(y_w)/|y_w|.

    The reference is not used.

    Xu et al. 2024, arXiv:2401.08417, equation 5: DPO under a uniform reference, and SFT's term.

    Args:
        beta: Scale of the log-probabilities.
        alpha: λ, the weight of SFT's term.
        label_smoothing: ε.
    """

    beta: float = 0.1
    alpha: float = 1.0
    label_smoothing: float = 0.0
    uses_reference: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Refuse a weight that would push chosen answers down."""
        super().__post_init__()
        self.at_least_zero("alpha")

    def __call__(self, policy: PairScores, reference: PairScores) -> Tensor:
        margin_B = self.beta * (policy.chosen - policy.rejected)
        return smoothed(margin_B, self.label_smoothing) - self.alpha * policy.per_token().chosen
