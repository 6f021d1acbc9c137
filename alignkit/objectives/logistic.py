"""Define the preference losses that apply a logistic loss to a pair's margin: DPO and variants.

Shape letters: B pairs. Symbols, as in the papers: y_w the chosen and y_l the rejected response,
π the policy, π_ref the reference, β the strength of the tie to it, ε = ``label_smoothing`` the
probability that a label is flipped, σ the logistic function, |y| the number of scored tokens.
``r(y) = log π(y|x) − log π_ref(y|x)`` is a response's log-ratio, β r(y) its implicit reward, and
Δ = r(y_w) − r(y_l) the pair's margin before β.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from alignkit.objectives.pairs import PairScores, PreferenceLoss


def smoothed(x_B: Tensor, label_smoothing: float) -> Tensor:
    """Return −(1−ε) log σ(x) − ε log σ(−x), the logistic loss of margins under flipped labels."""
    return -(1 - label_smoothing) * logsigmoid(x_B) - label_smoothing * logsigmoid(-x_B)


def bounded_expm1(x_B: Tensor) -> Tensor:
    """Return e^x − 1 with x at most 80, so that nothing overflows; no gradient beyond."""
    return torch.expm1(x_B.clamp(max=80.0))


@dataclass(frozen=True)
class DPO(PreferenceLoss):
    """Compute the DPO loss −log σ(βΔ).

    Rafailov et al. 2023, arXiv:2305.18290, equation 7. With ε > 0 it is the conservative cDPO,
    −(1−ε) log σ(βΔ) − ε log σ(−βΔ) (Mitchell 2023, "A note on DPO with noisy preferences").

    Args:
        beta: Strength of the tie to the reference.
        label_smoothing: ε.
    """

    beta: float = 0.1
    label_smoothing: float = 0.0
    trl_name: ClassVar[str | None] = "sigmoid"

    def __call__(self, policy: PairScores, reference: PairScores) -> Tensor:
        return smoothed(self.margin(policy, reference), self.label_smoothing)


@dataclass(frozen=True)
class RobustDPO(PreferenceLoss):
    """Compute the robust DPO loss [−(1−ε) log σ(βΔ) + ε log σ(−βΔ)] / (1 − 2ε).

    Its expectation over labels flipped with probability ε is the DPO loss of the true labels.
    Chowdhury et al. 2024, arXiv:2403.00409, section 3.1.

    Args:
        beta: Strength of the tie to the reference.
        label_smoothing: ε; 0 is DPO.
    """

    beta: float = 0.1
    label_smoothing: float = 0.1
    trl_name: ClassVar[str | None] = "robust"

    def __call__(self, policy: PairScores, reference: PairScores) -> Tensor:
        x_B, epsilon = self.margin(policy, reference), self.label_smoothing
        return (epsilon * logsigmoid(-x_B) - (1 - epsilon) * logsigmoid(x_B)) / (1 - 2 * epsilon)


@dataclass(frozen=True)
class EXO(PreferenceLoss):
    """Compute the EXO loss of two responses, KL((σ(βΔ), σ(−βΔ)) ‖ (1−ε, ε)).

    It is the reverse of the divergence that DPO minimises. Ji et al. 2024, arXiv:2402.00856,
    equation 16.

    Args:
        beta: Strength of the tie to the reference.
        label_smoothing: ε, above 0.
    """

    beta: float = 0.1
    label_smoothing: float = 0.001
    positive: ClassVar[tuple[str, ...]] = ("beta", "label_smoothing")
    trl_name: ClassVar[str | None] = "exo_pair"

    def __call__(self, policy: PairScores, reference: PairScores) -> Tensor:
        x_B, epsilon = self.margin(policy, reference), self.label_smoothing
        log_q, log_other = logsigmoid(x_B), logsigmoid(-x_B)
        kept_B = log_q.exp() * (log_q - math.log1p(-epsilon))
        return kept_B + log_other.exp() * (log_other - math.log(epsilon))


@dataclass(frozen=True)
class NormalizedDPO(PreferenceLoss):
    """Compute the length-normalised DPO loss −log σ(β r(y_w)/|y_w| − β r(y_l)/|y_l|).

    Labels are smoothed as in `DPO`. Lambert et al. 2024 (Tülu 3), arXiv:2411.15124, section 5.

    Args:
        beta: Strength of the tie to the reference, for log-ratios a token.
        label_smoothing: ε.
    """

    beta: float = 5.0
    label_smoothing: float = 0.0
    trl_name: ClassVar[str | None] = "sigmoid_norm"

    def __call__(self, policy: PairScores, reference: PairScores) -> Tensor:
        return smoothed(self.margin(policy, reference), self.label_smoothing)

    def rewards(self, policy: PairScores, reference: PairScores) -> tuple[Tensor, Tensor]:
        """Return β r(y)/|y| of both sides, [B] fp32 each."""
        return super().rewards(policy.per_token(), reference.per_token())


@dataclass(frozen=True)
class DiscoPOP(PreferenceLoss):
    """Compute the DiscoPOP loss (1 − s)·(−log σ(βΔ)) + s·exp(−βΔ) with the gate s = σ(βΔ/τ).

    Lu et al. 2024, arXiv:2406.08414, equation 5. The second term is computed as
    exp(log s − βΔ), because the product is 0·∞ from βΔ ≈ −89 on.

    Args:
        beta: Strength of the tie to the reference.
        tau: τ, the width of the gate.
    """

    beta: float = 0.1
    tau: float = 0.05
    positive: ClassVar[tuple[str, ...]] = ("beta", "tau")
    trl_name: ClassVar[str | None] = "discopop"

    def __call__(self, policy: PairScores, reference: PairScores) -> Tensor:
        x_B = self.margin(policy, reference)
        gate_B = x_B / self.tau
        return -torch.sigmoid(-gate_B) * logsigmoid(x_B) + torch.exp(logsigmoid(gate_B) - x_B)


@dataclass(frozen=True)
class AOT(PreferenceLoss):
    """Compute the paired AOT loss: DPO's loss between sorted policy and reference margins.

    Melnyk et al. 2024, arXiv:2406.05882, section 3 (paired). Sorting matches quantiles, so
    element b of the result belongs to the b-th quantile of the batch and not to pair b. Only the
    mean is meaningful. In training it is over all pairs of an optimizer step, of every micro-batch
    and rank (`alignkit.modules.whole_step`); in validation it depends on which share a batch.

    Args:
        beta: Strength of the tie to the reference.
        label_smoothing: ε.
    """

    beta: float = 0.1
    label_smoothing: float = 0.0
    whole_step: ClassVar[bool] = True
    trl_name: ClassVar[str | None] = "aot"

    def __call__(self, policy: PairScores, reference: PairScores) -> Tensor:
        policy_B = (policy.chosen - policy.rejected).sort().values
        reference_B = (reference.chosen - reference.rejected).sort().values
        return smoothed(self.beta * (policy_B - reference_B), self.label_smoothing)


@dataclass(frozen=True)
class UnpairedAOT(PreferenceLoss):
    """Compute the unpaired AOT loss: DPO's loss between sorted chosen and rejected rewards.

    Melnyk et al. 2024, arXiv:2406.05882, section 3 (unpaired). As with `AOT`, element b of the
    result belongs to a quantile and not to a pair.

    Args:
        beta: Strength of the tie to the reference.
        label_smoothing: ε.
    """

    beta: float = 0.1
    label_smoothing: float = 0.0
    whole_step: ClassVar[bool] = True
    trl_name: ClassVar[str | None] = "aot_unpaired"

    def __call__(self, policy: PairScores, reference: PairScores) -> Tensor:
        chosen_B, rejected_B = self.rewards(policy, reference)
        return smoothed(chosen_B.sort().values - rejected_B.sort().values, self.label_smoothing)
