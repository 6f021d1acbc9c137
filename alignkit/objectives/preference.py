"""Losses over preference pairs: pure functions from two models' views to one loss a pair.

Shape letters: B pairs, R = 2B responses. Symbols, as in the papers: y_w the chosen and y_l the
rejected response, π the policy, π_ref the reference, β the strength of the tie to it,
ε = ``label_smoothing`` the probability that a label is flipped, σ the logistic function, |y| the
number of scored tokens. ``r(y) = log π(y|x) − log π_ref(y|x)`` is a response's log-ratio, β r(y)
its implicit reward, and Δ = r(y_w) − r(y_l) the pair's margin before β.

Every loss takes ``(policy, reference, *, beta, label_smoothing)`` and returns [B] fp32. A loss
whose equation has no ε refuses one: ignoring it would train something else than was asked for.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from alignkit.objectives.pairs import (
    LOSSES,
    PairScores,
    PreferenceLoss,
    get_loss,
    register_loss,
    rewards,
)

__all__ = ["LOSSES", "PairScores", "PreferenceLoss", "get_loss", "register_loss", "rewards"]


def _smoothed(x_B: Tensor, label_smoothing: float) -> Tensor:
    """−(1−ε) log σ(x) − ε log σ(−x): the logistic loss under labels flipped with probability ε."""
    return -(1 - label_smoothing) * logsigmoid(x_B) - label_smoothing * logsigmoid(-x_B)


def _margin(policy: PairScores, reference: PairScores, beta: float) -> Tensor:
    """βΔ, the difference of the implicit rewards."""
    chosen_B, rejected_B = rewards(policy, reference, beta)
    return chosen_B - rejected_B


@register_loss(smoothing="optional")
def sigmoid(
    policy: PairScores, reference: PairScores, *, beta: float, label_smoothing: float
) -> Tensor:
    """DPO: −log σ(βΔ).

    Rafailov et al. 2023, arXiv:2305.18290, equation 7. With ε > 0 the conservative cDPO,
    −(1−ε) log σ(βΔ) − ε log σ(−βΔ) (Mitchell 2023, "A note on DPO with noisy preferences").
    """
    return _smoothed(_margin(policy, reference, beta), label_smoothing)


@register_loss(smoothing="optional")
def robust(
    policy: PairScores, reference: PairScores, *, beta: float, label_smoothing: float
) -> Tensor:
    """Robust DPO: [−(1−ε) log σ(βΔ) + ε log σ(−βΔ)] / (1 − 2ε), unbiased under flipped labels.

    Chowdhury et al. 2024, arXiv:2403.00409, section 3.1.
    """
    x_B = _margin(policy, reference, beta)
    clean_B = -(1 - label_smoothing) * logsigmoid(x_B)
    flipped_B = -label_smoothing * logsigmoid(-x_B)
    return (clean_B - flipped_B) / (1 - 2 * label_smoothing)


@register_loss()
def hinge(policy: PairScores, reference: PairScores, *, beta: float) -> Tensor:
    """SLiC on log-ratios: max(0, 1 − βΔ).

    Zhao et al. 2023, arXiv:2305.10425, section 2, on log-ratios instead of log-probabilities as
    in Liu et al. 2023 (RSO), arXiv:2309.06657.
    """
    return torch.relu(1 - _margin(policy, reference, beta))


@register_loss()
def ipo(policy: PairScores, reference: PairScores, *, beta: float) -> Tensor:
    """IPO: (r(y_w)/|y_w| − r(y_l)/|y_l| − 1/(2β))².

    Azar et al. 2023, arXiv:2310.12036, equation 17, where β is called τ; per token, as its
    authors train it, so that the target 1/(2β) does not depend on length.
    """
    margin_B = _margin(policy.per_token(), reference.per_token(), 1.0)
    return (margin_B - 1 / (2 * beta)).square()


@register_loss(smoothing="required")
def exo_pair(
    policy: PairScores, reference: PairScores, *, beta: float, label_smoothing: float
) -> Tensor:
    """EXO over two responses: KL((σ(βΔ), σ(−βΔ)) ‖ (1−ε, ε)), the reverse of DPO's KL.

    Ji et al. 2024, arXiv:2402.00856, equation 16; they use ε = 0.001.
    """
    x_B = _margin(policy, reference, beta)
    labels = torch.tensor([1 - label_smoothing, label_smoothing], device=x_B.device).log()
    log_q = torch.stack([logsigmoid(x_B), logsigmoid(-x_B)])
    return (log_q.exp() * (log_q - labels[:, None])).sum(0)


@register_loss()
def nca_pair(policy: PairScores, reference: PairScores, *, beta: float) -> Tensor:
    """NCA over two responses: −log σ(β r(y_w)) − ½ log σ(−β r(y_w)) − ½ log σ(−β r(y_l)).

    Chen et al. 2024, arXiv:2402.05369, section 4.1 with a preference for two responses: it
    holds the chosen reward itself up, where DPO only holds up the difference.
    """
    chosen_B, rejected_B = rewards(policy, reference, beta)
    return -logsigmoid(chosen_B) - 0.5 * logsigmoid(-chosen_B) - 0.5 * logsigmoid(-rejected_B)


@register_loss()
def bco_pair(policy: PairScores, reference: PairScores, *, beta: float) -> Tensor:
    """BCO: −log σ(β r(y_w)) − log σ(−β r(y_l)), a classifier of good and bad answers.

    Jung et al. 2024, arXiv:2404.04656, section 4, with the reward shift δ = 0.
    """
    chosen_B, rejected_B = rewards(policy, reference, beta)
    return -logsigmoid(chosen_B) - logsigmoid(-rejected_B)


@register_loss()
def sppo_hard(policy: PairScores, reference: PairScores, *, beta: float) -> Tensor:
    """SPPO with certain labels: (r(y_w) − 1/(2β))² + (r(y_l) + 1/(2β))².

    Wu et al. 2024, arXiv:2405.00675, equation 4.7 with P(y_w ≻ y_l) = 1 and η = 1/β.
    """
    chosen_B, rejected_B = rewards(policy, reference, 1.0)
    return (chosen_B - 0.5 / beta).square() + (rejected_B + 0.5 / beta).square()


@register_loss()
def apo_zero(policy: PairScores, reference: PairScores, *, beta: float) -> Tensor:
    """APO-zero: 1 − σ(β r(y_w)) + σ(β r(y_l)), chosen up and rejected down.

    D'Oosterlinck et al. 2024, arXiv:2408.06266, equation 7 plus 1; for chosen answers better
    than the model's own.
    """
    chosen_B, rejected_B = rewards(policy, reference, beta)
    return torch.sigmoid(-chosen_B) + torch.sigmoid(rejected_B)


@register_loss()
def apo_down(policy: PairScores, reference: PairScores, *, beta: float) -> Tensor:
    """APO-down: σ(β r(y_w)) + 1 − σ(βΔ), both down and rejected further.

    D'Oosterlinck et al. 2024, arXiv:2408.06266, equation 8 plus 1; for chosen answers worse
    than the model's own.
    """
    chosen_B, rejected_B = rewards(policy, reference, beta)
    return torch.sigmoid(chosen_B) + torch.sigmoid(rejected_B - chosen_B)


@register_loss(smoothing="optional")
def sigmoid_norm(
    policy: PairScores, reference: PairScores, *, beta: float, label_smoothing: float
) -> Tensor:
    """Length-normalised DPO: −log σ(β r(y_w)/|y_w| − β r(y_l)/|y_l|), smoothed like `sigmoid`.

    Lambert et al. 2024 (Tülu 3), arXiv:2411.15124, section 5; it wants a larger β (they use 5).
    """
    margin_B = _margin(policy.per_token(), reference.per_token(), beta)
    return _smoothed(margin_B, label_smoothing)


@register_loss()
def discopop(
    policy: PairScores, reference: PairScores, *, beta: float, tau: float = 0.05
) -> Tensor:
    """DiscoPOP: (1 − s)·(−log σ(βΔ)) + s·exp(−βΔ) with the gate s = σ(βΔ/τ).

    Lu et al. 2024, arXiv:2406.08414, equation 5. The second term is taken as
    exp(log s − βΔ): as a product it is 0·∞ from βΔ ≈ −89 on.
    """
    x_B = _margin(policy, reference, beta)
    return -torch.sigmoid(-x_B / tau) * logsigmoid(x_B) + torch.exp(logsigmoid(x_B / tau) - x_B)


@register_loss(smoothing="optional")
def aot(
    policy: PairScores, reference: PairScores, *, beta: float, label_smoothing: float
) -> Tensor:
    """AOT on pairs: DPO's loss between sorted margins of the policy and of the reference.

    Melnyk et al. 2024, arXiv:2406.05882, section 3 (paired). Sorting matches quantiles, so
    element b is the b-th quantile of the batch and no longer pair b; only the mean has a meaning,
    and it depends on which pairs share a batch.
    """
    policy_B = (policy.chosen - policy.rejected).sort().values
    reference_B = (reference.chosen - reference.rejected).sort().values
    return _smoothed(beta * (policy_B - reference_B), label_smoothing)


@register_loss(smoothing="optional")
def aot_unpaired(
    policy: PairScores, reference: PairScores, *, beta: float, label_smoothing: float
) -> Tensor:
    """AOT on two sets: DPO's loss between the sorted rewards of chosen and of rejected answers.

    Melnyk et al. 2024, arXiv:2406.05882, section 3 (unpaired); as with `aot`, element b is a
    quantile and not a pair.
    """
    chosen_B, rejected_B = rewards(policy, reference, beta)
    return _smoothed(chosen_B.sort().values - rejected_B.sort().values, label_smoothing)


@register_loss(smoothing="optional")
def simpo(
    policy: PairScores,
    reference: PairScores,
    *,
    beta: float,
    label_smoothing: float,
    gamma: float = 0.5,
) -> Tensor:
    """SimPO: −log σ(β log π(y_w)/|y_w| − β log π(y_l)/|y_l| − γ); the reference is not used.

    Meng et al. 2024, arXiv:2405.14734, equation 6; it wants β from 2 to 10 and γ near β/2.
    """
    mean = policy.per_token()
    return _smoothed(beta * (mean.chosen - mean.rejected) - gamma, label_smoothing)


@register_loss()
def orpo(policy: PairScores, reference: PairScores, *, beta: float) -> Tensor:
    """ORPO: −log p_w − β log σ(log p_w/(1−p_w) − log p_l/(1−p_l)); the reference is not used.

    Hong et al. 2024, arXiv:2403.07691, equations 4, 6 and 7, with p = π(y)^{1/|y|}, the geometric
    mean over tokens, and β their λ.
    """
    mean = policy.per_token()
    odds_B = mean.chosen - mean.rejected - _log1mexp(mean.chosen) + _log1mexp(mean.rejected)
    return -mean.chosen - beta * logsigmoid(odds_B)


def _log1mexp(logp_B: Tensor) -> Tensor:
    """log(1 − e^x) for x ≤ 0, finite at x = 0 where a model is certain of a whole response."""
    return torch.log(-torch.expm1(logp_B.clamp(max=-1e-6)))
