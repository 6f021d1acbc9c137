"""Define the interface of preference losses and the scores of pairs that they take.

Shape letters: B pairs, R = 2B responses.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import inf
from numbers import Real
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor

from alignkit.errors import AlignkitError
from alignkit.objectives.values import has_fields, plain_fields, rebuilt


@dataclass(frozen=True)
class PairScores:
    """Hold one model's log-probabilities of B pairs of responses.

    Example:
        >>> import torch
        >>> sums, tokens = torch.tensor([-9.5, -7.0]), torch.tensor([10, 7])
        >>> scores = PairScores.from_responses(sums, tokens)  # one pair
        >>> scores.chosen, scores.rejected
        (tensor([-9.5000]), tensor([-7.]))
        >>> scores.per_token().chosen
        tensor([-0.9500])

    Attributes:
        chosen: [B] fp32, log-probability of each chosen response (a sum over its tokens).
        rejected: [B] fp32, the same for the rejected responses.
        chosen_tokens: [B] int64, how many scored tokens the sum runs over.
        rejected_tokens: [B] int64.
        chosen_weight: [B] fp32, how much like a sample of the policy the chosen response is, for a
            loss with ``weighs_answers``; without gradients.
        rejected_weight: [B] fp32.
    """

    chosen: Tensor
    rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor
    chosen_weight: Tensor | None = field(default=None, kw_only=True)
    rejected_weight: Tensor | None = field(default=None, kw_only=True)

    @classmethod
    def from_responses(cls, sums_R: Tensor, tokens_R: Tensor) -> PairScores:
        """Split the scores of responses into chosen and rejected ones.

        Args:
            sums_R: [2B] fp32, summed log-probabilities; in each pair chosen before rejected.
            tokens_R: [2B] int64, the number of scored tokens of each response.
        """
        return cls(sums_R[0::2], sums_R[1::2], tokens_R[0::2], tokens_R[1::2])

    def detached(self) -> PairScores:
        """Return the scores without their gradients."""
        return replace(self, chosen=self.chosen.detach(), rejected=self.rejected.detach())

    def per_token(self) -> PairScores:
        """Return the scores with log π(y|x) / |y|, means over tokens, in the place of sums."""
        return replace(
            self,
            chosen=self.chosen / self.chosen_tokens.clamp(min=1),
            rejected=self.rejected / self.rejected_tokens.clamp(min=1),
        )


class PreferenceLoss:
    """Define the interface of a loss over pairs of responses.

    A subclass is a frozen dataclass whose fields are its parameters, and defines ``__call__``.
    ``DPO(beta=0.1)(policy, reference)`` returns one loss for each pair. On the command line a
    loss from outside this package is chosen by its class path.

    Attributes:
        beta: Scale of the rewards.
        uses_reference: Whether ``__call__`` reads the reference. Where it does not, no reference
            is kept or scored.
        weighs_tokens: Whether log-probabilities are sums weighted by `token_weights`.
        weighs_answers: Whether ``__call__`` reads ``chosen_weight`` and ``rejected_weight``.
        ranks: Whether ``__call__`` takes `RankedScores`, of two responses or more to a prompt.
        whole_step: Whether pairs are compared with each other, so that the loss of an optimizer
            step is not a mean over its micro-batches.
        positive: The parameters that must be positive numbers.
        trl_name: What TRL's ``loss_type`` calls it.

    Raises:
        AlignkitError: A parameter out of its range.
    """

    beta: float = 1.0
    uses_reference: ClassVar[bool] = True
    weighs_tokens: ClassVar[bool] = False
    weighs_answers: ClassVar[bool] = False
    ranks: ClassVar[bool] = False
    whole_step: ClassVar[bool] = False
    positive: ClassVar[tuple[str, ...]] = ("beta",)
    trl_name: ClassVar[str | None] = None

    def __post_init__(self) -> None:
        """Refuse parameters out of their range: ``label_smoothing`` lies in [0, 0.5)."""
        for name, each in getattr(self, "__dataclass_fields__", {}).items():
            if each.type in ("float", float) and not isinstance(getattr(self, name), Real):
                self.refuse(name, "must be a number")
        for name in self.positive:
            if not 0 < getattr(self, name) < inf:
                self.refuse(name, "must be positive")
        if not 0 <= getattr(self, "label_smoothing", 0.0) < 0.5:
            self.refuse("label_smoothing", "must lie in [0, 0.5)")

    def at_least_zero(self, *names: str) -> None:
        """Refuse parameters that are negative, infinite or no numbers.

        Raises:
            AlignkitError: One is.
        """
        for name in names:
            if not isinstance(getattr(self, name), Real) or not 0 <= getattr(self, name) < inf:
                self.refuse(name, "must be at least 0")

    def refuse(self, name: str, rule: str) -> NoReturn:
        """Raise the error that names one parameter and the rule it breaks.

        Raises:
            AlignkitError: Always.
        """
        kind, value = type(self).__name__, getattr(self, name)
        raise AlignkitError(f"model.loss.{name} of {kind}: {rule}, got {value}")

    @abstractmethod
    def __call__(self, policy: PairScores, reference: PairScores) -> Tensor:
        """Return the loss of each pair, [B] fp32.

        Args:
            policy: Scores under the model in training; they carry gradients.
            reference: The same under the frozen reference; the policy's own, without gradients,
                where ``uses_reference`` is false.
        """

    def token_weights(self, place_N: Tensor, length_N: Tensor, other_N: Tensor) -> Tensor:
        """Return the weight of each scored token's log-probability, [N] fp32; 1 by default.

        A loss that overrides it sets ``weighs_tokens``.

        Args:
            place_N: [N] int64, the token's place among the scored tokens of its response, from 0.
            length_N: [N] int64, the number of scored tokens of its response.
            other_N: [N] int64, that of the pair's other response.
        """
        return torch.ones_like(place_N, dtype=torch.float32)

    def rewards(self, policy: PairScores, reference: PairScores) -> tuple[Tensor, Tensor]:
        """Return the rewards of the chosen and of the rejected responses, [B] fp32 each.

        By default they are DPO's implicit rewards, ``β log π(y|x)/π_ref(y|x)`` (arXiv:2305.18290,
        equation 5, up to the partition function), and ``β log π(y|x)`` without a reference.
        """
        if not self.uses_reference:
            return self.beta * policy.chosen, self.beta * policy.rejected
        return (
            self.beta * (policy.chosen - reference.chosen),
            self.beta * (policy.rejected - reference.rejected),
        )

    def margin(self, policy: PairScores, reference: PairScores) -> Tensor:
        """Return the chosen reward minus the rejected one, [B] fp32."""
        chosen_B, rejected_B = self.rewards(policy, reference)
        return chosen_B - rejected_B

    def to_dict(self) -> dict[str, Any]:
        """Return the class path and the parameters as plain values, as in a configuration file."""
        kind = type(self)
        path = f"{kind.__module__}.{kind.__qualname__}"
        return {"class_path": path, "init_args": plain_fields(self)}

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> PreferenceLoss:
        """Rebuild a loss from the values that `to_dict` returned.

        Raises:
            AlignkitError: No loss of that class has been imported, or a parameter is wrong.
        """
        path = str(values["class_path"])
        for kind in known_losses():
            if path == f"{kind.__module__}.{kind.__qualname__}":
                return kind(**rebuilt(values.get("init_args", {}), PreferenceLoss.from_dict))
        raise AlignkitError(f"loss: no class {path} has been imported; import it first")


def known_losses() -> Iterator[type[PreferenceLoss]]:
    """Yield every loss class that has been imported: the subclasses that are dataclasses."""
    pending = PreferenceLoss.__subclasses__()
    while pending:
        kind = pending.pop(0)
        pending += kind.__subclasses__()
        if has_fields(kind):
            yield kind
