"""Define the preference losses that are sums over single responses: NCA, BCO and APO.

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
    """Compute the NCA loss −log σ(β r(y_w)) − ½ log σ(−β r(y_w)) − ½ log σ(−β r(y_l)).

    Chen et al. 2024, arXiv:2402.05369, section 4.1 with a preference over two responses. The loss
    keeps the chosen reward itself from falling, where DPO raises only the difference.

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
    """Compute the BCO loss −log σ(β r(y_w)) − log σ(−β r(y_l)).

    It trains the reward as a classifier of good and bad answers. Jung et al. 2024,
    arXiv:2404.04656, section 4, with the reward shift δ = 0.

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
    """Compute the APO-zero loss 1 − σ(β r(y_w)) + σ(β r(y_l)).

    It raises the chosen reward and lowers the rejected one, for chosen answers that are better
    than the model's own. D'Oosterlinck et al. 2024, arXiv:2408.06266, equation 7 plus 1.

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
    """Compute the APO-down loss σ(β r(y_w)) + 1 − σ(βΔ).

    It lowers both rewards, the rejected one further, for chosen answers that are worse than the
    model's own. D'Oosterlinck et al. 2024, arXiv:2408.06266, equation 8 plus 1.

    Args:
        beta: Strength of the tie to the reference.
    """

    beta: float = 0.1
    trl_name: ClassVar[str | None] = "apo_down"

    def __call__(self, policy: PairScores, reference: PairScores) -> Tensor:
        chosen_B, rejected_B = self.rewards(policy, reference)
        return torch.sigmoid(chosen_B) + torch.sigmoid(rejected_B - chosen_B)
