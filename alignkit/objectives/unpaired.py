"""Define the loss over unpaired answers, good ones and bad ones: KTO.

Shape letters: B answers. Symbols: as in `alignkit.objectives.logistic`; z₀ is the reference point,
an estimate of KL(π ‖ π_ref).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import inf
from numbers import Real
from typing import Any, ClassVar

import torch
from torch import Tensor

from alignkit.errors import AlignkitError
from alignkit.utils.exact import exact


@dataclass(frozen=True)
class UnpairedScores:
    """Hold one model's log-probabilities of B answers, and of as many to other prompts.

    Example:
        >>> sums, good = torch.tensor([-9.0, -7.0, -5.0, -3.0]), torch.tensor([True, False])
        >>> scores = UnpairedScores.from_responses(sums, good)
        >>> scores.answers.tolist(), scores.mismatched.tolist()
        ([-9.0, -5.0], [-7.0, -3.0])

    Attributes:
        answers: [B] fp32, summed log-probability of each answer.
        mismatched: [B] fp32, that of an answer of another row to each prompt.
        good: [B] bool, whether the answer is desirable.
    """

    answers: Tensor
    mismatched: Tensor
    good: Tensor

    @classmethod
    def from_responses(cls, sums_R: Tensor, good_B: Tensor) -> UnpairedScores:
        """Split the scores of responses.

        Args:
            sums_R: [2B] fp32, of each prompt its own answer before the mismatched one.
            good_B: [B] bool.
        """
        return cls(sums_R[0::2], sums_R[1::2], good_B)


@dataclass(frozen=True)
class KTO:
    """Compute the KTO loss λ_D (1 − σ(β (r(y) − z₀))) of a good answer, λ_U (1 − σ(β (z₀ − r(y)))).

    Ethayarajh et al. 2024, arXiv:2402.01306, equations 7 and 8; the second term is a bad answer's.
    z₀ = max(0, mean r(y')) over answers y' of other rows, without gradient, is how much likelier
    than under its reference the policy makes any answer; rewards count against it. In training it
    is over all rows of an optimizer step, of every micro-batch and rank.

    Args:
        beta: Strength of the tie to the reference.
        desirable_weight: λ_D; λ_D · n_good / (λ_U · n_bad) in [1, 4/3] suits unlike numbers.
        undesirable_weight: λ_U.

    Example:
        >>> zero = torch.zeros(2)
        >>> scores = UnpairedScores(zero, zero, torch.tensor([True, False]))
        >>> KTO()(scores, scores).tolist()
        [0.5, 0.5]

    Raises:
        AlignkitError: A parameter that is not positive, or a negative weight.
    """

    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    whole_step: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Refuse parameters out of their range."""
        for name, value in vars(self).items():
            if not isinstance(value, Real):
                raise AlignkitError(f"model.loss.{name} of KTO: must be a number, got {value!r}")
        if not 0 < self.beta < inf:
            raise AlignkitError(f"model.loss.beta of KTO: must be positive, got {self.beta}")
        for name in ("desirable_weight", "undesirable_weight"):
            if not 0 <= getattr(self, name) < inf:
                raise AlignkitError(
                    f"model.loss.{name} of KTO: must be at least 0, got {getattr(self, name)}"
                )

    def __call__(
        self, policy: UnpairedScores, reference: UnpairedScores, point: Tensor | None = None
    ) -> Tensor:
        """Return the loss of each answer, [B] fp32.

        Args:
            policy: Scores under the model in training; ``answers`` carry gradients.
            reference: The same under the frozen reference.
            point: Scalar z₀; by default that of these answers.
        """
        if point is None:
            point = self.point(policy.mismatched - reference.mismatched)
        distance_B = self.rewards(policy, reference) - self.beta * point
        good_B = self.desirable_weight * torch.sigmoid(-distance_B)
        return torch.where(policy.good, good_B, self.undesirable_weight * torch.sigmoid(distance_B))

    def rewards(self, policy: UnpairedScores, reference: UnpairedScores) -> Tensor:
        """Return β r(y) of each answer, [B] fp32."""
        return self.beta * (policy.answers - reference.answers)

    @staticmethod
    def point(ratios_B: Tensor) -> Tensor:
        """Return z₀ of the log-ratios of mismatched answers, a scalar without gradient."""
        return exact(ratios_B.detach()).mean().clamp(min=0).to(ratios_B.dtype)

    def to_dict(self) -> dict[str, Any]:
        """Return the parameters as plain values."""
        return asdict(self)

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> KTO:
        """Rebuild the loss from the values that `to_dict` returned."""
        return KTO(**values)
