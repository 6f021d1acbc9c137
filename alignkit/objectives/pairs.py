"""What every preference loss is made of: scores of pairs, their rewards, and the registry.

Shape letters: B pairs, R = 2B responses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any, Literal, Protocol

from torch import Tensor

from alignkit.errors import AlignkitError


@dataclass(frozen=True)
class PairScores:
    """One model's view of B pairs.

    Attributes:
        chosen: [B] fp32, log-probability of each chosen response (a sum over its tokens).
        rejected: [B] fp32, the same for the rejected responses.
        chosen_tokens: [B] int64, how many scored tokens the sum runs over.
        rejected_tokens: [B] int64.
    """

    chosen: Tensor
    rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor

    @classmethod
    def from_responses(cls, sums_R: Tensor, tokens_R: Tensor) -> PairScores:
        """Split a row of responses, chosen before rejected in each pair, into its two sides.

        Args:
            sums_R: [2B] fp32, summed log-probabilities.
            tokens_R: [2B] int64, the number of scored tokens of each response.
        """
        return cls(sums_R[0::2], sums_R[1::2], tokens_R[0::2], tokens_R[1::2])

    def per_token(self) -> PairScores:
        """Return the scores as means over tokens, log π(y|x) / |y|."""
        return PairScores(
            self.chosen / self.chosen_tokens.clamp(min=1),
            self.rejected / self.rejected_tokens.clamp(min=1),
            self.chosen_tokens,
            self.rejected_tokens,
        )


class PreferenceLoss(Protocol):
    """What every preference loss is: two views of B pairs to a loss a pair, [B] fp32."""

    def __call__(
        self, policy: PairScores, reference: PairScores, *, beta: float, label_smoothing: float
    ) -> Tensor:
        """Return the loss of each pair."""


LOSSES: dict[str, PreferenceLoss] = {}


def get_loss(name: str) -> PreferenceLoss:
    """Look a preference loss up by name.

    Raises:
        AlignkitError: No loss has that name; the message lists those there are.
    """
    if name not in LOSSES:
        raise AlignkitError(
            f"loss: there is no preference loss {name!r}; choose one of {', '.join(LOSSES)}"
        )
    return LOSSES[name]


def rewards(policy: PairScores, reference: PairScores, beta: float) -> tuple[Tensor, Tensor]:
    """Return the implicit rewards β r(y_w) and β r(y_l), [B] each (DPO, equation 5, up to Z)."""
    return (
        beta * (policy.chosen - reference.chosen),
        beta * (policy.rejected - reference.rejected),
    )


def register_loss(
    smoothing: Literal["none", "optional", "required"] = "none",
) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Register a loss under its function's name and check β and ε at every call.

    Args:
        smoothing: Whether the equation has an ε.
    """

    def register(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        name = function.__name__

        @wraps(function)
        def checked(
            policy: PairScores,
            reference: PairScores,
            *,
            beta: float,
            label_smoothing: float = 0.0,
            **options: Any,
        ) -> Tensor:
            if not beta > 0:
                raise AlignkitError(f"beta: must be positive, got {beta}")
            if smoothing == "none" and label_smoothing != 0:
                raise AlignkitError(
                    f"label_smoothing: {name!r} has none, got {label_smoothing}; set it to 0"
                )
            if not 0 <= label_smoothing < 0.5:
                raise AlignkitError(f"label_smoothing: must lie in [0, 0.5), got {label_smoothing}")
            if smoothing == "required" and label_smoothing == 0:
                raise AlignkitError(
                    f"label_smoothing: {name!r} needs more than 0; its paper uses 0.001"
                )
            if smoothing != "none":
                options["label_smoothing"] = label_smoothing
            return function(policy, reference, beta=beta, **options)

        LOSSES[name] = checked
        return checked

    return register
