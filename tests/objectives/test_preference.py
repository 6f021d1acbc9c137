"""Every preference loss against arithmetic that a reader can follow.

One pair is used throughout: β r(y_w) = ln 3 and β r(y_l) = −ln 3, so that every logistic is a
plain fraction: σ(ln 3) = 3/4, σ(−ln 3) = 1/4, and βΔ = 2 ln 3 = ln 9 gives σ(βΔ) = 9/10.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from math import exp, inf, log, nan
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alignkit.errors import AlignkitError
from alignkit.objectives.preference import (
    AOT,
    BCO,
    CPO,
    DPO,
    DPOP,
    EXO,
    IPO,
    NCA,
    ORPO,
    RPO,
    SPPO,
    WPO,
    AlphaDPO,
    AlphaPO,
    APODown,
    APOZero,
    ChosenNLL,
    DiscoPOP,
    ForwardKLDPO,
    Hinge,
    JensenShannonDPO,
    NormalizedDPO,
    PairScores,
    PreferenceLoss,
    RobustDPO,
    SimPO,
    UnpairedAOT,
    WeightedSum,
    known_losses,
    unknown_loss,
)
from alignkit.objectives.reward import BradleyTerry
from alignkit.objectives.unpaired import KTO

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

# the sum worked out by hand
BY_HAND: dict[PreferenceLoss, float] = {
    # −ln 0.9
    DPO(BETA): -log(0.9),
    # (−0.9 ln 0.9 + 0.1 ln 0.1) / 0.8
    RobustDPO(BETA, label_smoothing=0.1): (-0.9 * log(0.9) + 0.1 * log(0.1)) / 0.8,
    # 1 − ln 9 < 0
    Hinge(BETA): 0.0,
    # r/|y| = ±2 ln 3 / 2, their difference 2 ln 3, the target 1/(2·0.5) = 1
    IPO(BETA): (2 * LN3 - 1) ** 2,
    # KL((0.9, 0.1) ‖ (0.8, 0.2))
    EXO(BETA, label_smoothing=0.2): 0.9 * log(0.9 / 0.8) + 0.1 * log(0.1 / 0.2),
    # −ln 3/4 − ½ ln 1/4 − ½ ln 3/4
    NCA(BETA): -1.5 * log(0.75) - 0.5 * log(0.25),
    # −ln 3/4 − ln 3/4
    BCO(BETA): -2 * log(0.75),
    # (2 ln 3 − 1)² + (−2 ln 3 + 1)²
    SPPO(BETA): 2 * (2 * LN3 - 1) ** 2,
    # 1 − 3/4 + 1/4
    APOZero(BETA): 0.5,
    # 3/4 + 1 − 9/10
    APODown(BETA): 0.85,
    # β r/|y| = ±½ ln 3, their difference ln 3
    NormalizedDPO(BETA): -log(0.75),
    # the gate at τ = 1 is 9/10: 0.1 · (−ln 0.9) + 0.9 · exp(−ln 9)
    DiscoPOP(BETA, tau=1.0): 0.1 * -log(0.9) + 0.9 / 9,
    # one pair is its own quantile: as DPO, ε = 0.1
    AOT(BETA, label_smoothing=0.1): -0.9 * log(0.9) - 0.1 * log(0.1),
    UnpairedAOT(BETA): -log(0.9),
    # means (−7 + 2 ln 3)/2 and (−5 − 2 ln 3)/2: ½ (2 ln 3 − 1) − γ, and γ = −½ leaves ln 3
    SimPO(BETA, gamma=-0.5): -log(0.75),
    # p = exp of those means
    ORPO(BETA): 3.5
    - LN3
    + 0.5
    * log(
        1 + (exp(-2.5 - LN3) / (1 - exp(-2.5 - LN3))) / (exp(-3.5 + LN3) / (1 - exp(-3.5 + LN3)))
    ),
    # −log π(y_w)/|y_w| = (7 − 2 ln 3)/2
    ChosenNLL(): 3.5 - LN3,
    # DPO's and twice that
    RPO(BETA, alpha=2.0): -log(0.9) + 2 * (3.5 - LN3),
    # the chosen answer rose, so there is nothing to pay
    DPOP(BETA, penalty=9.0): -log(0.9),
    # β (−7 + 5 + 4 ln 3) = −1 + ln 9, and the chosen answer's cross-entropy
    CPO(BETA): log(1 + exp(1) / 9) + 3.5 - LN3,
    # f'(u) = 1 − 1/u with u = 9 and 1/9: 8/9 and −8
    ForwardKLDPO(BETA): log(1 + exp(-BETA * (8 / 9 + 8))),
    # u/(1+u) is 9/10 and 1/10: β ln 9 = ln 3
    JensenShannonDPO(BETA): -log(0.75),
    # (1 − u^−½) / ½ is 2 (1 − 1/3) and 2 (1 − 3): β · 16/3
    AlphaDPO(BETA, alpha=0.5): log(1 + exp(-8 / 3)),
    # R = 1 − 1/p: p_w = 3 e^−7/2, p_l = e^−5/2 / 3
    AlphaPO(BETA, alpha=1.0, gamma=1.0): log(1 + exp(1 - BETA * (3 * exp(2.5) - exp(3.5) / 3))),
    # −ln 0.9 and half of (7 − 2 ln 3)/2
    WeightedSum((DPO(BETA), ChosenNLL()), (1.0, 0.5)): -log(0.9) + 0.5 * (3.5 - LN3),
}


def kind(loss: PreferenceLoss) -> str:
    return type(loss).__name__


# What stands in tests/objectives/test_weighed.py, as it reads more than two sums.
ELSEWHERE = {"PlackettLuce", "WPO", "LDDPO"}


def test_every_loss_that_ships_is_worked_out_below() -> None:
    ship = {k.__name__ for k in known_losses() if k.__module__.startswith("alignkit.")}
    assert ship == set(map(kind, BY_HAND)) | ELSEWHERE


@pytest.mark.parametrize("loss", BY_HAND, ids=kind)
def test_value_by_hand(loss: PreferenceLoss) -> None:
    value = loss(POLICY, REFERENCE)
    assert value.shape == (1,)
    assert value.item() == pytest.approx(BY_HAND[loss], abs=1e-5)


def test_cdpo_smooths_the_label() -> None:
    """−0.9 ln 0.9 − 0.1 ln 0.1 = 0.0948 + 0.2303."""
    loss = DPO(BETA, label_smoothing=0.1)(POLICY, REFERENCE)
    assert loss.item() == pytest.approx(0.325083, abs=1e-5)


def test_hinge_of_a_wrong_pair() -> None:
    """Policy and reference swapped: βΔ = −ln 9, so 1 + ln 9."""
    loss = Hinge(BETA)(REFERENCE, POLICY)
    assert loss.item() == pytest.approx(1 + log(9), abs=1e-5)


def test_orpo_by_odds() -> None:
    """Per-token means ln 3/4 and ln 1/4: odds 3 and 1/3, odds ratio 9, −ln 3/4 − β ln 0.9."""
    policy = scores([4 * log(0.75)], [4 * log(0.25)], tokens=4)
    loss = ORPO(2.0)(policy, REFERENCE)
    assert loss.item() == pytest.approx(-log(0.75) - 2 * log(0.9), abs=1e-5)


def test_lengths_are_each_response_own() -> None:
    """r_w = 6 over 3 tokens, r_l = 5 over 1: 2 − 5 = −3 per token, (−3 − 1)² = 16 at β = ½."""
    policy = PairScores(
        torch.tensor([6.0]), torch.tensor([5.0]), torch.tensor([3]), torch.tensor([1])
    )
    reference = PairScores(torch.zeros(1), torch.zeros(1), torch.tensor([3]), torch.tensor([1]))
    assert IPO(0.5)(policy, reference).item() == pytest.approx(16.0)


def test_aot_matches_quantiles_not_pairs() -> None:
    """Policy margins (2, 0), reference margins (0, 1), β = 1.

    Sorted (0, 2) against (0, 1): differences 0 and 1, where pairs would have 2 and −1.
    """
    policy, reference = scores([2.0, 0.0], [0.0, 0.0]), scores([0.0, 1.0], [0.0, 0.0])
    loss = AOT(1.0)(policy, reference)
    assert loss.tolist() == pytest.approx([log(2), log(1 + exp(-1))], abs=1e-6)


def test_aot_unpaired_sorts_each_side() -> None:
    """Rewards (3, 1) and (0, 2) sort to (1, 3) and (0, 2): differences 1 and 1."""
    policy, reference = scores([3.0, 1.0], [0.0, 2.0]), scores([0.0, 0.0], [0.0, 0.0])
    loss = UnpairedAOT(1.0)(policy, reference)
    assert loss.tolist() == pytest.approx([log(1 + exp(-1))] * 2, abs=1e-6)


def test_policy_equal_to_reference_starts_at_ln_2() -> None:
    chosen, rejected = DPO(BETA).rewards(REFERENCE, REFERENCE)
    assert chosen.item() == rejected.item() == 0.0
    for loss in (DPO(), AOT(), NormalizedDPO()):
        assert loss(REFERENCE, REFERENCE).item() == pytest.approx(log(2))


def test_rewards_are_scaled_log_ratios() -> None:
    chosen, rejected = DPO(BETA).rewards(POLICY, REFERENCE)
    assert chosen.item() == pytest.approx(LN3, abs=1e-6)
    assert rejected.item() == pytest.approx(-LN3, abs=1e-6)


@pytest.mark.parametrize("loss", [NormalizedDPO(BETA), IPO(BETA)], ids=kind)
def test_rewards_are_of_what_is_trained(loss: PreferenceLoss) -> None:
    """Log-ratios of 8 over 8 tokens and of 6 over 2: the second is better a token."""
    tokens = torch.tensor([8]), torch.tensor([2])
    policy = PairScores(torch.tensor([8.0]), torch.tensor([6.0]), *tokens)
    nothing = PairScores(torch.zeros(1), torch.zeros(1), *tokens)
    chosen, rejected = loss.rewards(policy, nothing)
    assert (chosen.item(), rejected.item()) == (BETA * 1, BETA * 3)


def test_exo_is_of_the_margins_dtype() -> None:
    """In bf16, where log 0.999 is 0, labels stay what they are."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        loss = EXO(BETA, label_smoothing=0.001)(POLICY, REFERENCE)
    finally:
        torch.set_default_dtype(torch.float32)
    assert loss.item() == pytest.approx(0.9 * log(0.9 / 0.999) + 0.1 * log(0.1 / 0.001), abs=1e-6)


@pytest.mark.parametrize("loss", BY_HAND, ids=kind)
@pytest.mark.parametrize("margin", [-2000.0, 2000.0])
def test_finite_far_from_the_reference(loss: PreferenceLoss, margin: float) -> None:
    """A response of hundreds of tokens moves by hundreds of nats; losses and gradients stay finite.

    DiscoPOP's exp(−βΔ) alone would be e^1000.
    """
    chosen = torch.tensor([-3000.0 + margin / 2], requires_grad=True)
    tokens = torch.tensor([500])
    policy = PairScores(chosen, torch.tensor([-3000.0 - margin / 2]), tokens, tokens)
    reference = PairScores(torch.tensor([-3000.0]), torch.tensor([-3000.0]), tokens, tokens)
    value = loss(policy, reference)
    value.sum().backward()
    assert value.isfinite().all()
    assert chosen.grad is not None and chosen.grad.isfinite().all()


def test_orpo_is_finite_for_a_certain_response() -> None:
    """log π = 0 has infinite odds; the loss must not be."""
    chosen = torch.zeros(1, requires_grad=True)
    policy = PairScores(chosen, torch.tensor([-2.0]), torch.tensor([1]), torch.tensor([1]))
    loss = ORPO(0.1)(policy, REFERENCE)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert chosen.grad is not None and chosen.grad.isfinite().all()


def test_responses_split_into_pairs() -> None:
    pairs = PairScores.from_responses(torch.tensor([1.0, 2, 3, 4]), torch.tensor([5, 6, 7, 8]))
    assert pairs.chosen.tolist() == [1, 3]
    assert pairs.rejected.tolist() == [2, 4]
    assert pairs.chosen_tokens.tolist() == [5, 7]
    assert pairs.rejected_tokens.tolist() == [6, 8]


@pytest.mark.parametrize(
    ("name", "meant"), [("sigmoid", "DPO"), ("ipo", "IPO"), ("simpo", "SimPO"), ("Simpo2", "SimPO")]
)
def test_an_unknown_name_is_answered_with_what_was_meant(name: str, meant: str) -> None:
    line = str(unknown_loss(name))
    assert f"no preference loss {name!r}; did you mean {meant}? choose one of AlphaDPO, " in line
    assert "\n" not in line


def test_an_unknown_name_like_no_other_lists_the_known() -> None:
    assert "'xyz'; choose one of AlphaDPO, AlphaPO, AOT, APODown" in str(unknown_loss("xyz"))


@pytest.mark.parametrize("kind", [Hinge, IPO, NCA, APOZero, DiscoPOP, ORPO])
def test_there_is_no_smoothing_where_the_equation_has_none(kind: type) -> None:
    with pytest.raises(TypeError, match="label_smoothing"):
        kind(label_smoothing=0.1)


def test_exo_needs_smoothing() -> None:
    with pytest.raises(AlignkitError, match="label_smoothing of EXO: must be positive, got 0"):
        EXO(label_smoothing=0.0)


@pytest.mark.parametrize("value", [-0.1, 0.5, float("nan")])
def test_smoothing_outside_its_range(value: float) -> None:
    with pytest.raises(AlignkitError, match="label_smoothing of RobustDPO: must lie in"):
        RobustDPO(label_smoothing=value)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_beta_must_be_positive(value: float) -> None:
    with pytest.raises(AlignkitError, match=r"model\.loss\.beta of DPO: must be positive"):
        DPO(beta=value)
    with pytest.raises(AlignkitError, match="tau of DiscoPOP: must be positive"):
        DiscoPOP(tau=value)


@pytest.mark.parametrize("loss", BY_HAND, ids=kind)
def test_a_loss_survives_plain_values(loss: PreferenceLoss) -> None:
    assert PreferenceLoss.from_dict(loss.to_dict()) == loss


def test_a_class_nobody_imported_is_not_looked_for() -> None:
    with pytest.raises(AlignkitError, match=r"no class os\.PathLike has been imported"):
        PreferenceLoss.from_dict({"class_path": "os.PathLike"})


@pytest.mark.parametrize("loss", [SimPO(), ORPO()], ids=kind)
def test_without_a_reference_none_is_read(loss: PreferenceLoss) -> None:
    """NaN in the reference reaches nothing."""
    assert not loss.uses_reference
    nowhere = scores([float("nan")], [float("nan")])
    assert loss(POLICY, nowhere).isfinite().all()
    assert all(reward.isfinite().all() for reward in loss.rewards(POLICY, nowhere))


def test_dpop_pays_for_a_chosen_answer_that_fell() -> None:
    """r_w = −1, r_l = −3, β = ½, λ = 2: ½ (2 − 2·1) = 0."""
    policy, reference = scores([-2.0], [-4.0]), scores([-1.0], [-1.0])
    assert DPOP(0.5, penalty=2.0)(policy, reference).item() == pytest.approx(log(2))


def test_ipo_of_sums_is_the_papers_equation() -> None:
    """Δ = 4 ln 3 at β = ½: (4 ln 3 − 1)²."""
    assert IPO(BETA, per_token=False)(POLICY, REFERENCE).item() == pytest.approx((4 * LN3 - 1) ** 2)


def test_divergences_meet_in_their_limits() -> None:
    """α → 0 is DPO, α = 1 the forward KL; AlphaPO goes to SimPO."""
    torch.testing.assert_close(
        AlphaDPO(BETA, alpha=1e-4)(POLICY, REFERENCE),
        DPO(BETA)(POLICY, REFERENCE),
        atol=1e-3,
        rtol=0,
    )
    torch.testing.assert_close(
        AlphaDPO(BETA, alpha=1.0)(POLICY, REFERENCE), ForwardKLDPO(BETA)(POLICY, REFERENCE)
    )
    torch.testing.assert_close(
        AlphaPO(2.0, alpha=1e-3)(POLICY, POLICY), SimPO(2.0)(POLICY, POLICY), atol=0.01, rtol=0
    )


def test_nothing_added_is_dpo() -> None:
    plain = DPO(BETA)(REFERENCE, POLICY)
    assert torch.equal(RPO(BETA, alpha=0.0)(REFERENCE, POLICY), plain)
    assert torch.equal(DPOP(BETA, penalty=0.0)(REFERENCE, POLICY), plain)
    assert torch.equal(WeightedSum((DPO(BETA),))(REFERENCE, POLICY), plain)


def test_rewards_without_a_reference_are_the_policy_s_own() -> None:
    """Of a loss of one's own, whose reference scores are the policy's: a difference is 0."""

    @dataclass(frozen=True)
    class Margin(PreferenceLoss):
        beta: float = 0.5
        uses_reference: ClassVar[bool] = False

        def __call__(self, policy: PairScores, reference: PairScores) -> torch.Tensor:
            return policy.rejected - policy.chosen

    for loss in (Margin(), WeightedSum((Margin(), DPO()))):
        chosen, rejected = loss.rewards(POLICY, POLICY.detached())
        assert torch.equal(chosen, 0.5 * POLICY.chosen)
        assert torch.equal(rejected, 0.5 * POLICY.rejected)


def test_a_sum_reads_the_reference_where_a_term_does() -> None:
    assert WeightedSum((ChosenNLL(), DPO())).uses_reference
    assert not WeightedSum((ChosenNLL(), SimPO())).uses_reference


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: RPO(alpha=-1.0), "alpha of RPO: must be at least 0, got -1.0"),
        (lambda: DPOP(penalty=float("nan")), "penalty of DPOP: must be at least 0"),
        (lambda: CPO(alpha=float("inf")), "alpha of CPO: must be at least 0"),
        (lambda: SimPO(gamma=float("nan")), "gamma of SimPO: must be a number, got nan"),
        (lambda: AlphaDPO(alpha=0.0), r"alpha of AlphaDPO: must lie in \(0, 1\]"),
        (lambda: AlphaPO(alpha=0.0), "alpha of AlphaPO: must be a number other than 0"),
        (lambda: WeightedSum(()), "terms of WeightedSum: must name at least one loss"),
        (lambda: WeightedSum((DPO(),), (1.0, 2.0)), r"weights of WeightedSum: must be one a term"),
        (lambda: WeightedSum((DPO(),), (0.0,)), "weights of WeightedSum: must be positive"),
        (lambda: WeightedSum((DPO(),), ("1",)), "weights of WeightedSum: must be positive"),
        (lambda: WeightedSum((DPO(),), 1.0), "weights of WeightedSum: must be a list"),
        (lambda: WeightedSum(DPO()), "terms of WeightedSum: must be a list"),
        (lambda: WeightedSum((KTO(),)), "terms of WeightedSum: must all be losses over answers"),
        (lambda: WPO("IPO"), "of of WPO: must be a loss, such as IPO"),
        (lambda: DPO(beta="0.1"), "beta of DPO: must be a number, got 0.1"),
        (lambda: DPO(label_smoothing=None), "label_smoothing of DPO: must be a number"),
        (lambda: SimPO(gamma="1"), "gamma of SimPO: must be a number"),
        (lambda: KTO(undesirable_weight=None), "undesirable_weight of KTO: must be a number"),
        (lambda: BradleyTerry(margin="1"), "margin of BradleyTerry: must be at least 0"),
    ],
)
def test_parameters_that_cannot_work_are_refused(make: Callable, said: str) -> None:
    with pytest.raises(AlignkitError, match=said):
        make()


@pytest.mark.parametrize(
    "kind", [k for k in known_losses() if k.__module__.startswith("alignkit.")]
)
@pytest.mark.parametrize("value", [nan, inf])
def test_no_parameter_may_be_nan_or_infinite(kind: type[PreferenceLoss], value: float) -> None:
    for name in (f.name for f in fields(kind) if isinstance(f.default, float)):
        with pytest.raises(AlignkitError, match=f"{name} of {kind.__name__}: "):
            kind(**{name: value})


FINITE = st.floats(-200, 0, width=32)


@given(st.tuples(FINITE, FINITE, FINITE, FINITE), st.integers(1, 50), st.integers(1, 50))
@settings(max_examples=60, deadline=None)
def test_what_holds_of_every_loss(values: tuple[float, ...], chosen: int, rejected: int) -> None:
    """Losses are finite; those of a margin alone fall when the chosen answer becomes likelier."""
    tokens = torch.tensor([chosen]), torch.tensor([rejected])
    a, b, c, d = (torch.tensor([value]) for value in values)
    policy, reference = PairScores(a, b, *tokens), PairScores(c, d, *tokens)
    better = PairScores(a + 1, b, *tokens)
    for loss in BY_HAND:
        assert loss(policy, reference).isfinite().all(), loss
    monotone = (DPO(), RPO(), DPOP(), CPO(), ChosenNLL(), ForwardKLDPO(), JensenShannonDPO())
    for loss in (*monotone, AlphaDPO(), NormalizedDPO(), Hinge(), APOZero(), BCO()):
        now, then = loss(policy, reference).item(), loss(better, reference).item()
        assert then <= now + 1e-5 * abs(now), loss


@given(FINITE, FINITE, FINITE, FINITE)
@settings(max_examples=60, deadline=None)
def test_sides_that_change_places_change_the_margins_sign(
    a: float, b: float, c: float, d: float
) -> None:
    policy, reference = scores([a], [b]), scores([c], [d])
    swapped, other = scores([b], [a]), scores([d], [c])
    for loss in (DPO(), ForwardKLDPO(), JensenShannonDPO(), AlphaDPO(), CPO(), AlphaPO()):
        assert torch.equal(loss.margin(policy, reference), -loss.margin(swapped, other))
