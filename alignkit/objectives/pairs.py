"""What every preference loss is made of: two models' scores of pairs, and the interface.

Shape letters: B pairs, R = 2B responses.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from difflib import get_close_matches
from math import inf
from typing import Any, ClassVar, NoReturn

from torch import Tensor

from alignkit.errors import AlignkitError


@dataclass(frozen=True)
class PairScores:
    """One model's view of B pairs.

    ``PairScores(tensor([-9.5]), tensor([-7.0]), tensor([12]), tensor([8]))`` is one pair whose
    chosen response has 12 tokens and log-probability −9.5.

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

    def detached(self) -> PairScores:
        """Return the scores without their gradients."""
        return replace(self, chosen=self.chosen.detach(), rejected=self.rejected.detach())

    def per_token(self) -> PairScores:
        """Return the scores as means over tokens, log π(y|x) / |y|."""
        return PairScores(
            self.chosen / self.chosen_tokens.clamp(min=1),
            self.rejected / self.rejected_tokens.clamp(min=1),
            self.chosen_tokens,
            self.rejected_tokens,
        )


class PreferenceLoss:
    """A loss over pairs: a subclass is a frozen dataclass whose fields are its parameters.

    ``DPO(beta=0.1)(policy, reference)`` is one loss a pair. A subclass of your own needs
    ``__call__`` alone; on the command line it is chosen by its class path.

    Attributes:
        beta: Scale of the rewards.
        uses_reference: Whether ``__call__`` reads the reference. Where it does not, no reference
            is kept or scored.
        positive: The parameters that must be positive numbers.
        trl_name: What TRL's ``loss_type`` calls it.

    Raises:
        AlignkitError: A parameter out of its range.
    """

    beta: float = 1.0
    uses_reference: ClassVar[bool] = True
    positive: ClassVar[tuple[str, ...]] = ("beta",)
    trl_name: ClassVar[str | None] = None

    def __post_init__(self) -> None:
        """Refuse parameters that cannot work; an ε is a probability of less than one half."""
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
            if not 0 <= getattr(self, name) < inf:
                self.refuse(name, "must be at least 0")

    def refuse(self, name: str, rule: str) -> NoReturn:
        """Raise the line about one parameter.

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

    def rewards(self, policy: PairScores, reference: PairScores) -> tuple[Tensor, Tensor]:
        """Return what the loss takes for the rewards of both sides, [B] each, for logging.

        By default DPO's implicit ones, ``β log π(y|x)/π_ref(y|x)`` (arXiv:2305.18290, equation 5,
        up to the partition function).
        """
        return (
            self.beta * (policy.chosen - reference.chosen),
            self.beta * (policy.rejected - reference.rejected),
        )

    def margin(self, policy: PairScores, reference: PairScores) -> Tensor:
        """Return the chosen reward minus the rejected one, [B]."""
        chosen_B, rejected_B = self.rewards(policy, reference)
        return chosen_B - rejected_B

    def to_dict(self) -> dict[str, Any]:
        """Return class and parameters as plain values, as a configuration file has them."""
        kind = type(self)
        parameters = asdict(self)  # type: ignore[call-overload]
        return {"class_path": f"{kind.__module__}.{kind.__qualname__}", "init_args": parameters}

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> PreferenceLoss:
        """Rebuild a loss from `to_dict`.

        Raises:
            AlignkitError: No loss of that class has been imported, or a parameter is wrong.
        """
        path = str(values["class_path"])
        for kind in known_losses():
            if path == f"{kind.__module__}.{kind.__qualname__}":
                return kind(**values.get("init_args", {}))
        raise AlignkitError(f"loss: no class {path} has been imported; import it first")


def known_losses() -> Iterator[type[PreferenceLoss]]:
    """Yield every loss that has been imported: the dataclasses among the subclasses."""
    pending = PreferenceLoss.__subclasses__()
    while pending:
        kind = pending.pop(0)
        pending += kind.__subclasses__()
        if "__dataclass_fields__" in vars(kind):
            yield kind


def unknown_loss(name: str) -> AlignkitError:
    """Return the line about a name that no loss has: what was meant, and what there is."""
    kinds = {kind.__name__: kind for kind in known_losses()}
    meant = [other for other, kind in kinds.items() if kind.trl_name == name]
    folded = {other.casefold(): other for other in kinds}
    close = get_close_matches(name.casefold(), folded, n=1, cutoff=0.5)
    meant = meant or [folded[match] for match in close]
    hint = f"did you mean {meant[0]}? " if meant else ""
    listed = ", ".join(sorted(kinds, key=str.casefold))
    return AlignkitError(
        f"model.loss: there is no preference loss {name!r}; {hint}"
        f"choose one of {listed}, or the class path of your own"
    )
