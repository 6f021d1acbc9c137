"""Losses that read more than two sums a pair: Plackett–Luce, LD-DPO and WPO.

By hand as in `test_preference`: at β = ½ rewards of ln 3 and −ln 3, σ(ln 9) = 9/10.
"""

from __future__ import annotations

from itertools import permutations
from math import exp, log

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from alignkit.errors import AlignkitError
from alignkit.objectives.preference import (
    AOT,
    DPO,
    IPO,
    LDDPO,
    WPO,
    ChosenNLL,
    PairScores,
    PlackettLuce,
    PreferenceLoss,
    RankedScores,
    WeightedSum,
)

LN3 = log(3)


def ranked(*prompts: list[float]) -> RankedScores:
    sums = torch.tensor([value for prompt in prompts for value in prompt])
    tokens = torch.arange(1, len(sums) + 1)
    return RankedScores.from_ranked(sums, tokens, [len(prompt) for prompt in prompts])


def zeros(scores: RankedScores) -> RankedScores:
    return ranked(*([0.0] * int(count) for count in scores.there.sum(1)))


def likelihood(rewards: list[float]) -> float:
    """The probability of an order, by the definition."""
    result = 1.0
    for i, reward in enumerate(rewards):
        result *= exp(reward) / sum(map(exp, rewards[i:]))
    return result


def test_plackett_luce_by_hand() -> None:
    """e^r is 3, 2 and 1: the best of all is 3/6, then the second of the rest 2/3."""
    scores = ranked([log(3), log(2), 0.0], [log(9), 0.0])
    loss = PlackettLuce(1.0)(scores, zeros(scores))
    assert loss.tolist() == pytest.approx([-log(1 / 3), -log(0.9)], abs=1e-6)


def test_prompts_of_unlike_counts_share_a_batch() -> None:
    scores = ranked([1.0, 2.0], [3.0, 4.0, 5.0, 6.0], [7.0, 8.0, 9.0])
    assert scores.chosen.tolist() == [1, 3, 7]
    assert scores.rejected.tolist() == [2, 6, 9]
    assert scores.chosen_tokens.tolist() == [1, 3, 7]
    assert scores.rejected_tokens.tolist() == [2, 6, 9]
    assert scores.there.sum(1).tolist() == [2, 4, 3]
    assert scores.sums[2].tolist() == [7, 8, 9, 0]
    loss = PlackettLuce(0.3)(scores, zeros(scores))
    alone = [PlackettLuce(0.3)(ranked(p), zeros(ranked(p))) for p in ([1.0, 2.0], [7.0, 8.0, 9.0])]
    assert torch.equal(loss[[0, 2]], torch.cat(alone))


REWARDS = st.lists(st.floats(-20, 20, width=32), min_size=2, max_size=5)


@given(REWARDS, st.floats(-50, 50, width=32))
@settings(max_examples=50, deadline=None)
def test_plackett_luce_is_a_distribution_over_orders(rewards: list[float], shift: float) -> None:
    """All orders have probability 1 together, and the prompt's partition function cancels."""
    loss, nothing = PlackettLuce(1.0), zeros(ranked(rewards))
    orders = list(permutations(rewards))
    total = sum(exp(-loss(ranked(list(order)), nothing).item()) for order in orders)
    assert total == pytest.approx(1.0, rel=1e-4)
    value = loss(ranked(rewards), nothing).item()
    assert exp(-value) == pytest.approx(likelihood(rewards), rel=1e-3, abs=1e-12)
    moved = loss(ranked([reward + shift for reward in rewards]), nothing).item()
    assert moved == pytest.approx(value, abs=1e-3)


@given(REWARDS)
@settings(max_examples=30, deadline=None)
def test_two_responses_are_dpo(rewards: list[float]) -> None:
    two = rewards[:2]
    scores, nothing = ranked(two), zeros(ranked(two))
    torch.testing.assert_close(PlackettLuce(0.7)(scores, nothing), DPO(0.7)(scores, nothing))


def test_gradient_of_plackett_luce() -> None:
    """Against finite differences, with a prompt of fewer responses in the batch."""
    tokens = torch.tensor([3] * 6)
    start = torch.tensor([0.5, -1.0, 2.0, 0.1, 1.5, -0.5], dtype=torch.float64)

    def loss(sums: Tensor) -> Tensor:
        scores = RankedScores.from_ranked(sums, tokens, [4, 2])
        return PlackettLuce(0.8)(scores, RankedScores.from_ranked(0 * start, tokens, [4, 2])).sum()

    assert torch.autograd.gradcheck(loss, start.requires_grad_())


@pytest.mark.parametrize("margin", [-3000.0, 3000.0])
def test_finite_far_from_the_reference(margin: float) -> None:
    sums = torch.tensor([margin, 0.0, -margin, 0.0, 0.0], requires_grad=True)
    scores = RankedScores.from_ranked(sums, torch.tensor([9] * 5), [3, 2])
    value = PlackettLuce()(scores, zeros(scores))
    value.sum().backward()
    assert value.isfinite().all()
    assert sums.grad is not None and sums.grad.isfinite().all()
    assert not scores.detached().sums.requires_grad


def test_plain_pairs_are_no_ranks() -> None:
    one = torch.ones(1)
    pair = PairScores(one, one, one, one)
    with pytest.raises(TypeError, match="RankedScores"):
        PlackettLuce()(pair, pair)


def test_ld_dpo_weighs_what_is_beyond_the_shorter_response() -> None:
    """Three tokens against five: places 3 and 4 of the longer count α."""
    loss = LDDPO(alpha=0.25)
    place = torch.tensor([0, 1, 2, 0, 1, 2, 3, 4])
    own, other = torch.tensor([3] * 3 + [5] * 5), torch.tensor([5] * 3 + [3] * 5)
    assert loss.token_weights(place, own, other).tolist() == [1] * 6 + [0.25] * 2
    assert DPO().token_weights(place, own, other).tolist() == [1] * 8
    with pytest.raises(AlignkitError, match=r"alpha of LDDPO: must lie in \[0, 1\], got 1.5"):
        LDDPO(alpha=1.5)
    with pytest.raises(AlignkitError, match="one of them weighs tokens"):
        WeightedSum((LDDPO(), ChosenNLL()))


def weighed(chosen: float, rejected: float) -> PairScores:
    """Rewards ln 3 and −ln 3 at β = ½, with the weights of both answers."""
    tokens = torch.tensor([2])
    weights = {"chosen_weight": torch.tensor([chosen]), "rejected_weight": torch.tensor([rejected])}
    return PairScores(
        torch.tensor([2 * LN3 - 7.0]), torch.tensor([-2 * LN3 - 5.0]), tokens, tokens, **weights
    )


REFERENCE = PairScores(*(torch.tensor([value]) for value in (-7.0, -5.0)), *[torch.tensor([2])] * 2)


def test_wpo_by_hand() -> None:
    """½ · ¼ · −ln 0.9; of IPO (2 ln 3 − 1)²."""
    policy = weighed(0.5, 0.25)
    assert WPO(DPO(0.5))(policy, REFERENCE).item() == pytest.approx(-log(0.9) / 8, abs=1e-6)
    assert WPO(IPO(0.5))(policy, REFERENCE).item() == pytest.approx((2 * LN3 - 1) ** 2 / 8)
    assert torch.equal(WPO(DPO(0.5))(weighed(1, 1), REFERENCE), DPO(0.5)(policy, REFERENCE))
    assert WPO(DPO(0.5)).margin(policy, REFERENCE).item() == pytest.approx(2 * LN3)
    assert not WPO(ChosenNLL()).uses_reference
    with pytest.raises(TypeError, match="weights of answers"):
        WPO()(REFERENCE, REFERENCE)


@pytest.mark.parametrize("inner", [AOT(), LDDPO(), WPO(), PlackettLuce()], ids=repr)
def test_wpo_weighs_pairs_alone(inner: PreferenceLoss) -> None:
    with pytest.raises(AlignkitError, match=r"of of WPO: must be a loss of single pairs"):
        WPO(inner)


@pytest.mark.parametrize(
    "loss", [WPO(IPO(0.3)), LDDPO(0.2, alpha=0.1), PlackettLuce(0.4)], ids=repr
)
def test_a_loss_survives_plain_values(loss: PreferenceLoss) -> None:
    assert PreferenceLoss.from_dict(loss.to_dict()) == loss
