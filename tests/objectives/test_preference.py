"""Every preference loss against arithmetic that a reader can follow.

One pair is used throughout: β r(y_w) = ln 3 and β r(y_l) = −ln 3, so that every logistic is a
plain fraction: σ(ln 3) = 3/4, σ(−ln 3) = 1/4, and βΔ = 2 ln 3 = ln 9 gives σ(βΔ) = 9/10.
"""

from __future__ import annotations

from math import exp, log

import pytest
import torch

from alignkit.errors import AlignkitError
from alignkit.objectives import preference
from alignkit.objectives.preference import LOSSES, PairScores, get_loss, rewards

BETA = 0.5
LN3 = log(3)


def scores(chosen: list[float], rejected: list[float], tokens: int = 2) -> PairScores:
    """Pairs whose responses all have `tokens` scored tokens."""
    return PairScores(
        torch.tensor(chosen),
        torch.tensor(rejected),
        torch.full((len(chosen),), tokens),
        torch.full((len(rejected),), tokens),
    )


REFERENCE = scores([-7.0], [-5.0])
POLICY = scores([-7.0 + LN3 / BETA], [-5.0 - LN3 / BETA])

# name: (label_smoothing, extra options, the sum worked out by hand)
BY_HAND = {
    # −ln 0.9
    "sigmoid": (0.0, {}, -log(0.9)),
    # (−0.9 ln 0.9 + 0.1 ln 0.1) / 0.8
    "robust": (0.1, {}, (-0.9 * log(0.9) + 0.1 * log(0.1)) / 0.8),
    # 1 − ln 9 < 0
    "hinge": (0.0, {}, 0.0),
    # r/|y| = ±2 ln 3 / 2, their difference 2 ln 3, the target 1/(2·0.5) = 1
    "ipo": (0.0, {}, (2 * LN3 - 1) ** 2),
    # KL((0.9, 0.1) ‖ (0.8, 0.2))
    "exo_pair": (0.2, {}, 0.9 * log(0.9 / 0.8) + 0.1 * log(0.1 / 0.2)),
    # −ln 3/4 − ½ ln 1/4 − ½ ln 3/4
    "nca_pair": (0.0, {}, -1.5 * log(0.75) - 0.5 * log(0.25)),
    # −ln 3/4 − ln 3/4
    "bco_pair": (0.0, {}, -2 * log(0.75)),
    # (2 ln 3 − 1)² + (−2 ln 3 + 1)²
    "sppo_hard": (0.0, {}, 2 * (2 * LN3 - 1) ** 2),
    # 1 − 3/4 + 1/4
    "apo_zero": (0.0, {}, 0.5),
    # 3/4 + 1 − 9/10
    "apo_down": (0.0, {}, 0.85),
    # β r/|y| = ±½ ln 3, their difference ln 3
    "sigmoid_norm": (0.0, {}, -log(0.75)),
    # the gate at τ = 1 is 9/10: 0.1 · (−ln 0.9) + 0.9 · exp(−ln 9)
    "discopop": (0.0, {"tau": 1.0}, 0.1 * -log(0.9) + 0.9 / 9),
    # one pair is its own quantile: as sigmoid, ε = 0.1
    "aot": (0.1, {}, -0.9 * log(0.9) - 0.1 * log(0.1)),
    "aot_unpaired": (0.0, {}, -log(0.9)),
    # means (−7 + 2 ln 3)/2 and (−5 − 2 ln 3)/2: ½ (2 ln 3 − 1) − γ, and γ = −½ leaves ln 3
    "simpo": (0.0, {"gamma": -0.5}, -log(0.75)),
    # p = exp of those means
    "orpo": (
        0.0,
        {},
        3.5
        - LN3
        + 0.5
        * log(
            1
            + (exp(-2.5 - LN3) / (1 - exp(-2.5 - LN3))) / (exp(-3.5 + LN3) / (1 - exp(-3.5 + LN3)))
        ),
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_value_by_hand(name: str) -> None:
    label_smoothing, options, expected = BY_HAND[name]
    loss = LOSSES[name](POLICY, REFERENCE, beta=BETA, label_smoothing=label_smoothing, **options)
    assert loss.shape == (1,)
    assert loss.item() == pytest.approx(expected, abs=1e-5)


def test_cdpo_smooths_the_label() -> None:
    """−0.9 ln 0.9 − 0.1 ln 0.1 = 0.0948 + 0.2303."""
    loss = preference.sigmoid(POLICY, REFERENCE, beta=BETA, label_smoothing=0.1)
    assert loss.item() == pytest.approx(0.325083, abs=1e-5)


def test_hinge_of_a_wrong_pair() -> None:
    """Policy and reference swapped: βΔ = −ln 9, so 1 + ln 9."""
    loss = preference.hinge(REFERENCE, POLICY, beta=BETA)
    assert loss.item() == pytest.approx(1 + log(9), abs=1e-5)


def test_orpo_by_odds() -> None:
    """Per-token means ln 3/4 and ln 1/4: odds 3 and 1/3, odds ratio 9, −ln 3/4 − β ln 0.9."""
    policy = scores([4 * log(0.75)], [4 * log(0.25)], tokens=4)
    loss = preference.orpo(policy, REFERENCE, beta=2.0)
    assert loss.item() == pytest.approx(-log(0.75) - 2 * log(0.9), abs=1e-5)


def test_lengths_are_each_response_own() -> None:
    """r_w = 6 over 3 tokens, r_l = 5 over 1: 2 − 5 = −3 per token, (−3 − 1)² = 16 at β = ½."""
    policy = PairScores(
        torch.tensor([6.0]), torch.tensor([5.0]), torch.tensor([3]), torch.tensor([1])
    )
    reference = PairScores(torch.zeros(1), torch.zeros(1), torch.tensor([3]), torch.tensor([1]))
    assert preference.ipo(policy, reference, beta=0.5).item() == pytest.approx(16.0)


def test_aot_matches_quantiles_not_pairs() -> None:
    """Policy margins (2, 0), reference margins (0, 1), β = 1.

    Sorted (0, 2) against (0, 1): differences 0 and 1, where pairs would have 2 and −1.
    """
    policy, reference = scores([2.0, 0.0], [0.0, 0.0]), scores([0.0, 1.0], [0.0, 0.0])
    loss = preference.aot(policy, reference, beta=1.0)
    assert loss.tolist() == pytest.approx([log(2), log(1 + exp(-1))], abs=1e-6)


def test_aot_unpaired_sorts_each_side() -> None:
    """Rewards (3, 1) and (0, 2) sort to (1, 3) and (0, 2): differences 1 and 1."""
    policy, reference = scores([3.0, 1.0], [0.0, 2.0]), scores([0.0, 0.0], [0.0, 0.0])
    loss = preference.aot_unpaired(policy, reference, beta=1.0)
    assert loss.tolist() == pytest.approx([log(1 + exp(-1))] * 2, abs=1e-6)


def test_policy_equal_to_reference_starts_at_ln_2() -> None:
    chosen, rejected = rewards(REFERENCE, REFERENCE, BETA)
    assert chosen.item() == rejected.item() == 0.0
    for name in ("sigmoid", "aot", "sigmoid_norm"):
        assert LOSSES[name](REFERENCE, REFERENCE, beta=0.1, label_smoothing=0.0).item() == (
            pytest.approx(log(2))
        )


def test_rewards_are_scaled_log_ratios() -> None:
    chosen, rejected = rewards(POLICY, REFERENCE, BETA)
    assert chosen.item() == pytest.approx(LN3, abs=1e-6)
    assert rejected.item() == pytest.approx(-LN3, abs=1e-6)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("margin", [-2000.0, 2000.0])
def test_finite_far_from_the_reference(name: str, margin: float) -> None:
    """A response of hundreds of tokens moves by hundreds of nats; losses and gradients stay finite.

    DiscoPOP's exp(−βΔ) alone would be e^1000.
    """
    chosen = torch.tensor([-3000.0 + margin / 2], requires_grad=True)
    tokens = torch.tensor([500])
    policy = PairScores(chosen, torch.tensor([-3000.0 - margin / 2]), tokens, tokens)
    reference = PairScores(torch.tensor([-3000.0]), torch.tensor([-3000.0]), tokens, tokens)
    smoothing = BY_HAND[name][0]
    loss = LOSSES[name](policy, reference, beta=BETA, label_smoothing=smoothing)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert chosen.grad is not None and chosen.grad.isfinite().all()


def test_orpo_is_finite_for_a_certain_response() -> None:
    """log π = 0 has infinite odds; the loss must not be."""
    chosen = torch.zeros(1, requires_grad=True)
    policy = PairScores(chosen, torch.tensor([-2.0]), torch.tensor([1]), torch.tensor([1]))
    loss = preference.orpo(policy, REFERENCE, beta=0.1)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert chosen.grad is not None and chosen.grad.isfinite().all()


def test_responses_split_into_pairs() -> None:
    pairs = PairScores.from_responses(torch.tensor([1.0, 2, 3, 4]), torch.tensor([5, 6, 7, 8]))
    assert pairs.chosen.tolist() == [1, 3]
    assert pairs.rejected.tolist() == [2, 4]
    assert pairs.chosen_tokens.tolist() == [5, 7]
    assert pairs.rejected_tokens.tolist() == [6, 8]


def test_unknown_name_lists_the_known() -> None:
    with pytest.raises(AlignkitError, match=r"'dpo'.*sigmoid.*orpo") as error:
        get_loss("dpo")
    assert "\n" not in str(error.value)
    assert get_loss("ipo") is preference.ipo


@pytest.mark.parametrize("name", ["hinge", "ipo", "nca_pair", "apo_zero", "discopop", "orpo"])
def test_smoothing_is_refused_where_the_equation_has_none(name: str) -> None:
    with pytest.raises(AlignkitError, match=f"label_smoothing: '{name}' has none, got 0.1"):
        LOSSES[name](POLICY, REFERENCE, beta=BETA, label_smoothing=0.1)


def test_exo_needs_smoothing() -> None:
    with pytest.raises(AlignkitError, match="'exo_pair' needs more than 0"):
        preference.exo_pair(POLICY, REFERENCE, beta=BETA, label_smoothing=0.0)


@pytest.mark.parametrize("value", [-0.1, 0.5, float("nan")])
def test_smoothing_outside_its_range(value: float) -> None:
    with pytest.raises(AlignkitError, match="label_smoothing: must lie in"):
        preference.robust(POLICY, REFERENCE, beta=BETA, label_smoothing=value)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan")])
def test_beta_must_be_positive(value: float) -> None:
    with pytest.raises(AlignkitError, match="beta: must be positive"):
        preference.sigmoid(POLICY, REFERENCE, beta=value, label_smoothing=0.0)
