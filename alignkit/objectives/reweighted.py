"""Define the losses that weigh tokens or whole pairs: LD-DPO and WPO.

Shape letters and symbols: as in `alignkit.objectives.logistic`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from alignkit.objectives.logistic import DPO
from alignkit.objectives.pairs import PairScores, PreferenceLoss
from alignkit.objectives.values import one_each


@dataclass(frozen=True)
class LDDPO(DPO):
    """Compute the LD-DPO loss: DPO's, with α as the weight of tokens beyond the shorter response.

    Liu et al. 2024, arXiv:2409.06411: log π(y) = Σ_{t ≤ l} log π(y_t) + α Σ_{t > l} log π(y_t) with
    l = min(|y_w|, |y_l|), under policy and reference alike. Of longer responses less is learnt from
    what makes them longer. TRL's ``ld_alpha`` is α. Rewards, ``logps/…``, ``val/kl`` and
    ``val/displacement`` are of these weighted sums.

    Args:
        beta: Strength of the tie to the reference.
        label_smoothing: ε.
        alpha: α, in [0, 1]; 1 is DPO.

    Example:
        >>> place, own, other = torch.tensor([0, 1, 2]), torch.tensor(3), torch.tensor(2)
        >>> LDDPO(alpha=0.5).token_weights(place, own, other).tolist()
        [1.0, 1.0, 0.5]
    """

    alpha: float = 0.5
    weighs_tokens: ClassVar[bool] = True
    trl_name: ClassVar[str | None] = None

    def __post_init__(self) -> None:
        """Refuse an α outside its range."""
        super().__post_init__()
        if not 0 <= self.alpha <= 1:
            self.refuse("alpha", "must lie in [0, 1]")

    def token_weights(self, place_N: Tensor, length_N: Tensor, other_N: Tensor) -> Tensor:
        """Return 1 for the tokens that both responses are long enough to have, α for the others."""
        ones_N = super().token_weights(place_N, length_N, other_N)
        return torch.where(place_N < torch.minimum(length_N, other_N), ones_N, self.alpha)


@dataclass(frozen=True)
class WPO(PreferenceLoss):
    """Compute w(y_w) w(y_l) L, another loss with pairs weighted by how like the policy's they are.

    Zhou et al. 2024, arXiv:2406.11827, equation 2 with sampled alignment:
    w(y) = exp((1/|y|) Σ_t [log π(y_t) − log Σ_v π(v)²]), which carries no gradient. Responses that
    the policy would hardly write count less, so that pairs of others come nearer to its own. TRL's
    ``use_weighting`` does the same. On the command line ``--model.loss WPO --model.loss.of IPO``.

    Args:
        of: L, a loss that takes pairs one by one.
    """

    of: PreferenceLoss = DPO()  # noqa: RUF009 (frozen)
    weighs_answers: ClassVar[bool] = True
    positive: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        """Refuse a loss whose values are not those of single pairs."""
        super().__post_init__()
        if not isinstance(self.of, PreferenceLoss):
            self.refuse("of", "must be a loss, such as IPO()")
        if self.of.whole_step or self.of.ranks or self.of.weighs_tokens or self.of.weighs_answers:
            self.refuse("of", "must be a loss of single pairs, without weights of its own")

    @property
    def uses_reference(self) -> bool:  # type: ignore[override]
        """Tell whether the loss inside reads the reference."""
        return self.of.uses_reference

    def __call__(self, policy: PairScores, reference: PairScores) -> Tensor:
        if policy.chosen_weight is None or policy.rejected_weight is None:
            raise TypeError("WPO needs the weights of answers, which PairScores may hold")
        loss_B = one_each(self.of(policy, reference), policy.chosen, self.of)
        return policy.chosen_weight * policy.rejected_weight * loss_B

    def rewards(self, policy: PairScores, reference: PairScores) -> tuple[Tensor, Tensor]:
        """Return the rewards of the loss inside, [B] each."""
        return self.of.rewards(policy, reference)
