"""Define the weighted sum of preference losses."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from numbers import Real
from typing import Any, ClassVar

from torch import Tensor

from alignkit.objectives.pairs import PairScores, PreferenceLoss
from alignkit.objectives.values import one_each


@dataclass(frozen=True)
class WeightedSum(PreferenceLoss):
    """Compute Σ_i w_i L_i over several losses.

    ``WeightedSum(terms=(DPO(beta=0.1), ChosenNLL()), weights=(1.0, 0.2))`` is DPO with a fifth of
    SFT's loss; on the command line ``--model.loss WeightedSum --model.loss.terms '[DPO, ChosenNLL]'
    --model.loss.weights '[1, 0.2]'``. A term with parameters of its own is written as
    ``{class_path: DPO, init_args: {beta: 0.3}}``.

    Rewards that are logged are those of the first term.

    Args:
        terms: The losses.
        weights: One positive number a term; 1 each by default.
    """

    terms: tuple[PreferenceLoss, ...] = ()  # refused, with a line that names the option
    weights: tuple[float, ...] = ()
    positive: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        """Refuse no terms, terms that weigh tokens, and weights that are not one a term."""
        super().__post_init__()
        for name in ("terms", "weights"):
            if not isinstance(getattr(self, name), (list, tuple)):
                self.refuse(name, "must be a list, of one value a term")
        object.__setattr__(self, "terms", tuple(self.terms))
        object.__setattr__(self, "weights", tuple(self.weights) or (1.0,) * len(self.terms))
        if not self.terms:
            self.refuse("terms", "must name at least one loss")
        if not all(isinstance(term, PreferenceLoss) for term in self.terms):
            self.refuse("terms", "must all be losses over answers to one prompt")
        if any(term.weighs_tokens for term in self.terms):
            self.refuse("terms", "must share one sum of log-probs, and one of them weighs tokens")
        if self.ranks and self.whole_step:
            self.refuse("terms", "must not compare the pairs of a step and rank k answers at once")
        if len(self.weights) != len(self.terms):
            self.refuse("weights", f"must be one a term ({len(self.terms)})")
        if not all(_is_number(weight) and 0 < weight < inf for weight in self.weights):
            self.refuse("weights", "must be positive")

    @property
    def uses_reference(self) -> bool:  # type: ignore[override]
        """Tell whether any term reads the reference."""
        return any(term.uses_reference for term in self.terms)

    @property
    def weighs_answers(self) -> bool:  # type: ignore[override]
        """Tell whether any term reads the weights of answers."""
        return any(term.weighs_answers for term in self.terms)

    @property
    def ranks(self) -> bool:  # type: ignore[override]
        """Tell whether any term takes ranked answers; the others see the best and the worst."""
        return any(term.ranks for term in self.terms)

    @property
    def whole_step(self) -> bool:  # type: ignore[override]
        """Tell whether any term compares pairs with each other."""
        return any(term.whole_step for term in self.terms)

    def __call__(self, policy: PairScores, reference: PairScores) -> Tensor:
        values = [one_each(term(policy, reference), policy.chosen, term) for term in self.terms]
        return sum(
            (w * value for w, value in zip(self.weights, values, strict=True)),
            start=policy.chosen.new_zeros(len(policy.chosen)),
        )

    def rewards(self, policy: PairScores, reference: PairScores) -> tuple[Tensor, Tensor]:
        """Return the first term's rewards, [B] each."""
        return self.terms[0].rewards(policy, reference)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real)
