"""Define the loss of reward models: Bradley–Terry, over pairs or k ranked answers.

Shape letters: B prompts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from alignkit.objectives.pairs import PairScores, PreferenceLoss
from alignkit.objectives.ranked import PlackettLuce, RankedScores


@dataclass(frozen=True)
class BradleyTerry:
    """Compute −log σ(r_w − r_l − m) + c (r_w + r_l)², the loss of rewards r of pairs.

    Ouyang et al. 2022, arXiv:2203.02155, equation 1; the margin m is Touvron et al. 2023's,
    arXiv:2307.09288, equation 2. Of k ranked answers the first term is Plackett–Luce's, and the
    second that of the best and the worst.

    Args:
        margin: m, by which a chosen answer should be better; of pairs alone.
        center: c, which keeps rewards near 0 (arXiv:2312.09244).

    Example:
        >>> one = torch.tensor([0.0])
        >>> round(BradleyTerry()(PairScores(one, one, one, one)).item(), 3)
        0.693
    """

    margin: float = 0.0
    center: float = 0.0

    def __post_init__(self) -> None:
        """Refuse numbers that are negative, infinite or none."""
        for name in ("margin", "center"):
            PreferenceLoss.at_least_zero(self, name)  # type: ignore[arg-type]

    refuse = PreferenceLoss.refuse

    def __call__(self, rewards: PairScores) -> Tensor:
        """Return the loss of each prompt, [B] fp32; ``rewards`` stand in log-probs' place."""
        if isinstance(rewards, RankedScores) and rewards.there.shape[1] > 2:
            nothing = RankedScores(
                **{**vars(rewards.detached()), "sums": torch.zeros_like(rewards.sums)}
            )
            loss_B = PlackettLuce(beta=1.0)(rewards, nothing)
        else:
            loss_B = -logsigmoid(rewards.chosen - rewards.rejected - self.margin)
        return loss_B + self.center * (rewards.chosen + rewards.rejected).square()

    def to_dict(self) -> dict[str, float]:
        """Return the parameters as plain values."""
        return {"margin": self.margin, "center": self.center}

    @staticmethod
    def from_dict(values: Mapping[str, float]) -> BradleyTerry:
        """Rebuild the loss from the values that `to_dict` returned."""
        return BradleyTerry(**values)
