"""Measure how a policy ranks held-out pairs: gauges that are logged under ``val/`` and ``test/``.

Every gauge is a function of sums over pairs, which are float64 and added over batches and ranks
(fp32 on Apple's MPS, which has none). It is exact under DDP, whatever the sizes of batches.

Shape letters: B pairs. Symbols: m the margin of a pair, its chosen reward minus its rejected one;
r the log-ratio of an answer, log π(y|x) − log π_ref(y|x).
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from alignkit.modules.metrics import ExactMetric
from alignkit.objectives.pairs import PairScores
from alignkit.utils.exact import exact

LIKE = 0.8
"""Answers are of like length where the shorter has this share of the longer one's tokens."""
BINS = 10
"""Bins of the predicted probability, which lies in [½, 1], of equal width."""


@dataclass(frozen=True)
class RatedPairs:
    """Hold what the gauges read of B pairs.

    Example:
        >>> one = torch.tensor([1.0])
        >>> scores = PairScores(-one, -one, torch.tensor([9]), torch.tensor([10]))
        >>> pairs = RatedPairs(scores, scores, chosen_reward=one, rejected_reward=0 * one)
        >>> pairs.credit.tolist(), pairs.alike.tolist()
        ([1.0], [True])

    Attributes:
        policy: Scores under the policy.
        reference: Scores under the reference; the policy's own where the loss reads none.
        chosen_reward: [B].
        rejected_reward: [B].
    """

    policy: PairScores
    reference: PairScores
    chosen_reward: Tensor
    rejected_reward: Tensor

    @property
    def margin(self) -> Tensor:
        """Return the margins, [B] float64."""
        return exact(self.chosen_reward) - exact(self.rejected_reward)

    @property
    def credit(self) -> Tensor:
        """Return 1 for a pair that is ranked right, ½ for a tie, 0 for a wrong one, NaN for NaN."""
        return (_sign(self.margin) + 1) / 2

    def sums(self) -> dict[str, Tensor]:
        """Return the sums over pairs of what TRL logs, by its names; a tie is half right."""
        return {
            "rewards/chosen": self.chosen_reward.sum(),
            "rewards/rejected": self.rejected_reward.sum(),
            "rewards/accuracies": self.credit.sum(),
            "rewards/margins": (self.chosen_reward - self.rejected_reward).sum(),
        }

    @property
    def alike(self) -> Tensor:
        """Tell which pairs have answers of like length, [B] bool."""
        chosen, rejected = self.policy.chosen_tokens, self.policy.rejected_tokens
        return torch.minimum(chosen, rejected) >= LIKE * torch.maximum(chosen, rejected)

    @property
    def log_ratios(self) -> Tensor:
        """Return r of the chosen answers, then of the rejected ones, [2B] float64."""
        ours = torch.cat((self.policy.chosen, self.policy.rejected))
        theirs = torch.cat((self.reference.chosen, self.reference.rejected))
        return exact(ours) - exact(theirs)


class Gauge(ExactMetric):
    """Define a number that is computed from sums over pairs.

    Attributes:
        size: How many sums there are.
        compares: Whether it compares the policy with a reference.
    """

    size: ClassVar[int] = 2
    compares: ClassVar[bool] = False
    sums: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        zeros = torch.zeros(self.size, dtype=torch.float64)
        self.add_state("sums", zeros, dist_reduce_fx="sum")

    def update(self, pairs: RatedPairs) -> None:
        """Add the sums of a batch."""
        # Not in place: a tensor made under inference mode cannot be changed outside of it.
        self.sums = self.sums + self.batch_sums(pairs)

    def compute(self) -> Tensor:
        """Return the number, fp32; NaN where there is nothing to compute it from."""
        return self.value(*self.sums.unbind()).float()

    @abstractmethod
    def batch_sums(self, pairs: RatedPairs) -> Tensor:
        """Return the sums over a batch, [size] float64."""

    @abstractmethod
    def value(self, *sums: Tensor) -> Tensor:
        """Return the number of the sums over all batches and ranks."""


class AccuracyError(Gauge):
    """Compute the standard error of ``rewards/accuracies``, √(s²/n); NaN for one pair."""

    size = 3

    def batch_sums(self, pairs: RatedPairs) -> Tensor:
        """Return the sums of the credit, of its square and of 1."""
        return _sums(pairs.credit, pairs.credit.square(), torch.ones_like(pairs.credit))

    def value(self, *sums: Tensor) -> Tensor:
        """Return the error, from the unbiased variance."""
        credit, squares, count = sums
        variance = (squares - credit.square() / count).clamp(min=0) / (count - 1)
        return (variance / count).sqrt()


class LikeLengthAccuracy(Gauge):
    """Compute the accuracy among pairs of like length, in which length tells nothing."""

    def batch_sums(self, pairs: RatedPairs) -> Tensor:
        """Return the credit and the number of those pairs."""
        alike = exact(pairs.alike)
        return _sums(pairs.credit.where(pairs.alike, 0), alike)

    def value(self, *sums: Tensor) -> Tensor:
        """Return their quotient."""
        credit, count = sums
        return credit / count


class Divergence(Gauge):
    """Compute the mean of ½ r² over answers, an estimate of KL(π ‖ π_ref) in nats an answer.

    It is Schulman's estimator k2: never negative, right to second order near the reference for
    answers that either model may have written, and larger than the divergence far from it.
    """

    compares = True

    def batch_sums(self, pairs: RatedPairs) -> Tensor:
        """Return the sum of ½ r² and the number of answers."""
        ratios = pairs.log_ratios
        return _sums(ratios.square() / 2, torch.ones_like(ratios))

    def value(self, *sums: Tensor) -> Tensor:
        """Return their quotient."""
        squares, count = sums
        return squares / count


class Displacement(Gauge):
    """Compute the share of pairs whose chosen answer is less likely than under the reference."""

    compares = True

    def batch_sums(self, pairs: RatedPairs) -> Tensor:
        """Return the number of those pairs and of all."""
        change = exact(pairs.policy.chosen) - exact(pairs.reference.chosen)
        return _sums(_sign(change).clamp(max=0).neg(), torch.ones_like(change))

    def value(self, *sums: Tensor) -> Tensor:
        """Return their quotient."""
        fell, count = sums
        return fell / count


class LengthCorrelation(Gauge):
    """Compute Pearson's correlation of the rewards and the lengths of all answers, in tokens."""

    size = 6

    def batch_sums(self, pairs: RatedPairs) -> Tensor:
        """Return the sums of 1, x, y, x², y² and xy."""
        x = exact(torch.cat((pairs.chosen_reward, pairs.rejected_reward)))
        y = exact(torch.cat((pairs.policy.chosen_tokens, pairs.policy.rejected_tokens)))
        return _sums(torch.ones_like(x), x, y, x * x, y * y, x * y)

    def value(self, *sums: Tensor) -> Tensor:
        """Return the covariance over both deviations; NaN where all of one are equal."""
        n, x, y, xx, yy, xy = sums
        covariance = n * xy - x * y
        spread = (n * xx - x * x).clamp(min=0) * (n * yy - y * y).clamp(min=0)
        return covariance / spread.sqrt()


class CalibrationError(Gauge):
    """Compute the expected calibration error of σ(m) as the probability that a pair is so ranked.

    The probability of the answer with the larger reward, σ(|m|), falls into one of ten bins of
    [½, 1]. Within each the mean probability is compared with the accuracy, and the differences are
    averaged, weighted by the number of pairs (Guo et al. 2017, arXiv:1706.04599, equation 3).
    """

    size = 3 * BINS

    def batch_sums(self, pairs: RatedPairs) -> Tensor:
        """Return the number, the probability and the credit of the pairs of each bin."""
        predicted = torch.sigmoid(pairs.margin.abs())
        bins = ((predicted - 0.5) * 2 * BINS).nan_to_num().long().clamp(max=BINS - 1)
        columns = (torch.ones_like(predicted), predicted, pairs.credit)
        zeros = predicted.new_zeros(BINS)
        return torch.cat([zeros.index_add(0, bins, column) for column in columns])

    def value(self, *sums: Tensor) -> Tensor:
        """Return the mean difference."""
        count, predicted, credit = torch.stack(sums).view(3, BINS)
        gap: Tensor = (predicted - credit).abs().sum() / count.sum()
        return gap


GAUGES: dict[str, type[Gauge]] = {
    "accuracy_se": AccuracyError,
    "accuracy_like_length": LikeLengthAccuracy,
    "kl": Divergence,
    "displacement": Displacement,
    "reward_length_correlation": LengthCorrelation,
    "calibration_error": CalibrationError,
}
"""The gauges by the names that they are logged under; TRL has none of them."""


def _sign(values: Tensor) -> Tensor:
    """Return −1, 0 or 1; NaN for NaN, where torch's own is 0."""
    return values.sign().where(~values.isnan(), values)


def _sums(*columns_B: Tensor) -> Tensor:
    return torch.stack([exact(column).sum() for column in columns_B])
