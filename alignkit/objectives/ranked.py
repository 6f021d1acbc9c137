"""Define the preference loss over k ranked responses: Plackett–Luce.

Shape letters: B prompts, K responses of the prompt that has most, R responses of all prompts.
Symbols: as in `alignkit.objectives.logistic`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from alignkit.objectives.pairs import PairScores, PreferenceLoss

_NOT_THERE = -1e30
"""Stands in for −∞, whose gradient would be NaN."""


@dataclass(frozen=True, kw_only=True)
class RankedScores(PairScores):
    """Hold one model's log-probabilities of ranked responses; as a pair, the best and the worst.

    Example:
        >>> sums, tokens = torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([4, 4, 4])
        >>> scores = RankedScores.from_ranked(sums, tokens, counts=[3])
        >>> scores.sums.tolist(), scores.chosen.tolist(), scores.rejected.tolist()
        ([[-1.0, -2.0, -3.0]], [-1.0], [-3.0])

    Attributes:
        sums: [B, K] fp32 summed log-probabilities, the best response first; 0 where there is none.
        there: [B, K] bool, whether there is a response.
    """

    sums: Tensor
    there: Tensor

    @classmethod
    def from_ranked(cls, sums_R: Tensor, tokens_R: Tensor, counts: Sequence[int]) -> RankedScores:
        """Put the scores of responses together by prompt.

        Args:
            sums_R: [R] fp32 summed log-probabilities, prompt by prompt, the best response first.
            tokens_R: [R] int64, the number of scored tokens of each.
            counts: The number of responses of each prompt.
        """
        counts_B = torch.tensor(counts, device=sums_R.device)
        last_B = counts_B.cumsum(0) - 1
        first_B = last_B - counts_B + 1
        place_K = torch.arange(max(counts), device=sums_R.device)
        there_BK = place_K < counts_B[:, None]
        index_BK = torch.minimum(first_B[:, None] + place_K, last_B[:, None])
        return cls(
            chosen=sums_R[first_B],
            rejected=sums_R[last_B],
            chosen_tokens=tokens_R[first_B],
            rejected_tokens=tokens_R[last_B],
            sums=torch.where(there_BK, sums_R[index_BK], 0.0),
            there=there_BK,
        )

    def detached(self) -> RankedScores:
        """Return the scores without their gradients."""
        return replace(self, **vars(super().detached()) | {"sums": self.sums.detach()})


@dataclass(frozen=True)
class PlackettLuce(PreferenceLoss):
    """Compute −Σ_i log [e^{β r(y_i)} / Σ_{j ≥ i} e^{β r(y_j)}] over k responses, the best first.

    Rafailov et al. 2023, arXiv:2305.18290, appendix A.3: the probability, under the implicit
    rewards, that the best response is picked of all, the second of the rest, and so on. Two
    responses are DPO. Rewards and margins that are logged are those of the best and the worst.

    Args:
        beta: Strength of the tie to the reference.
    """

    beta: float = 0.1
    ranks: ClassVar[bool] = True

    def __call__(self, policy: PairScores, reference: PairScores) -> Tensor:
        if not (isinstance(policy, RankedScores) and isinstance(reference, RankedScores)):
            raise TypeError("PlackettLuce takes RankedScores; see RankedScores.from_ranked")
        rewards_BK = self.beta * (policy.sums - reference.sums)
        places = policy.there.shape[1]
        later_KK = torch.ones(places, places, dtype=torch.bool, device=rewards_BK.device).triu()
        left_BKK = later_KK & policy.there[:, None, :]
        rest_BK = rewards_BK[:, None, :].masked_fill(~left_BKK, _NOT_THERE).logsumexp(-1)
        return torch.where(policy.there, rest_BK - rewards_BK, 0.0).sum(1)
