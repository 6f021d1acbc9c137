"""Preference losses that judge each answer by itself: NCA, BCO, APO.

Shape letters and symbols: as in `alignkit.objectives.logistic`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from alignkit.objectives.pairs import PairScores, PreferenceLoss


@dataclass(frozen=True)
class NCA(PreferenceLoss):
    """NCA over two responses: −log σ(β r(y_w)) − ½ log σ(−β r(y_w)) − ½ log σ(−β r(y_l)).

    Chen et al. 2024, arXiv:2402.05369, section 4.1 with a preference for two responses: it
    holds the chosen reward itself up, where DPO only holds up the difference.

    Args:
        beta: Strength of the tie to the reference.
    """

    beta: float = 0.1
    trl_name: ClassVar[str | None] = "nca_pair"

    def __call__(self, policy: PairScores, reference: PairScores) -> Tensor:
        chosen_B, rejected_B = self.rewards(policy, reference)
        return -logsigmoid(chosen_B) - 0.5 * logsigmoid(-chosen_B) - 0.5 * logsigmoid(-rejected_B)


@dataclass(frozen=True)
class BCO(PreferenceLoss):
    """BCO: −log σ(β r(y_w)) − log σ(−β r(y_l)), a classifier of good and bad answers.

    Jung et al. 2024, arXiv:2404.04656, section 4, with the reward shift δ = 0.

    Args:
        beta: Strength of the tie to the reference.
    """

    beta: float = 0.1
    trl_name: ClassVar[str | None] = "bco_pair"

    def __call__(self, policy: PairScores, reference: PairScores) -> Tensor:
        chosen_B, rejected_B = self.rewards(policy, reference)
        return -logsigmoid(chosen_B) - logsigmoid(-rejected_B)


@dataclass(frozen=True)
class APOZero(PreferenceLoss):
    """APO-zero: 1 − σ(β r(y_w)) + σ(β r(y_l)), chosen up and rejected down.

    D'Oosterlinck et al. 2024, arXiv:2408.06266, equation 7 plus 1; for chosen answers better
    than the model's own.

    Args:
        beta: Strength of the tie to the reference.
    """

    beta: float = 0.1
    trl_name: ClassVar[str | None] = "apo_zero"

    def __call__(self, policy: PairScores, reference: PairScores) -> Tensor:
        chosen_B, rejected_B = self.rewards(policy, reference)
        return torch.sigmoid(-chosen_B) + torch.sigmoid(rejected_B)


@dataclass(frozen=True)
class APODown(PreferenceLoss):
    """APO-down: σ(β r(y_w)) + 1 − σ(βΔ), both down and rejected further.

    D'Oosterlinck et al. 2024, arXiv:2408.06266, equation 8 plus 1; for chosen answers worse
    than the model's own.

    Args:
        beta: Strength of the tie to the reference.
    """

    beta: float = 0.1
    trl_name: ClassVar[str | None] = "apo_down"

    def __call__(self, policy: PairScores, reference: PairScores) -> Tensor:
        chosen_B, rejected_B = self.rewards(policy, reference)
        return torch.sigmoid(chosen_B) + torch.sigmoid(rejected_B - chosen_B)
