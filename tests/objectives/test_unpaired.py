"""KTO against arithmetic that a reader can follow: σ(ln 3) = 3/4."""

from __future__ import annotations

from math import log

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alignkit.errors import AlignkitError
from alignkit.objectives.preference import unknown_loss
from alignkit.objectives.unpaired import KTO, UnpairedScores

LN3 = log(3)


def scores(answers: list[float], mismatched: list[float], good: list[bool]) -> UnpairedScores:
    return UnpairedScores(torch.tensor(answers), torch.tensor(mismatched), torch.tensor(good))


GOOD = [True, False]
REFERENCE = scores([-5.0, -6.0], [-7.0, -8.0], GOOD)


def test_by_hand() -> None:
    """β = ½, r = 2 ln 3 + 1 and −2 ln 3 + 1, z₀ = ½(3 − 1) = 1: distances ln 3 and −ln 3."""
    policy = scores([-5 + 2 * LN3 + 1, -6 - 2 * LN3 + 1], [-4.0, -9.0], GOOD)
    loss = KTO(0.5, desirable_weight=2.0, undesirable_weight=4.0)(policy, REFERENCE)
    assert loss.tolist() == pytest.approx([2 / 4, 4 / 4], abs=1e-6)
    assert KTO(0.5).rewards(policy, REFERENCE).tolist() == pytest.approx([LN3 + 0.5, 0.5 - LN3])


def test_the_point_is_not_negative_and_carries_no_gradient() -> None:
    """z₀ would be −2: it is 0, and σ(0) = ½."""
    answers = torch.tensor([-5.0, -6.0], requires_grad=True)
    mismatched = torch.tensor([-9.0, -10.0], requires_grad=True)
    policy = UnpairedScores(answers, mismatched, torch.tensor(GOOD))
    loss = KTO()(policy, REFERENCE)
    assert loss.tolist() == [0.5, 0.5]
    loss.sum().backward()
    assert mismatched.grad is None
    assert answers.grad is not None
    assert answers.grad.tolist() == pytest.approx([-0.025, 0.025])


VALUE = st.floats(-200, 0, width=32)


@given(VALUE, VALUE, VALUE, VALUE, st.floats(0.01, 2))
@settings(max_examples=60, deadline=None)
def test_a_good_answer_is_raised_and_a_bad_one_lowered(
    answer: float, reference: float, other: float, other_reference: float, beta: float
) -> None:
    """What a bad answer loses is what a good one keeps; both lie in [0, 1]."""

    def loss(at: float, good: bool) -> float:
        ours, theirs = scores([at], [other], [good]), scores([reference], [other_reference], [good])
        return KTO(beta)(ours, theirs).item()

    assert loss(answer, True) + loss(answer, False) == pytest.approx(1.0, abs=1e-5)
    assert 0 <= loss(answer, True) <= 1
    assert loss(answer + 1, True) <= loss(answer, True) + 1e-6
    assert loss(answer + 1, False) >= loss(answer, False) - 1e-6


@pytest.mark.parametrize("margin", [-2000.0, 2000.0])
def test_finite_far_from_the_reference(margin: float) -> None:
    answers = torch.tensor([margin, margin], requires_grad=True)
    policy = UnpairedScores(answers, torch.tensor([margin, margin]), torch.tensor(GOOD))
    KTO()(policy, REFERENCE).sum().backward()
    assert answers.grad is not None and answers.grad.isfinite().all()


def test_parameters_that_cannot_work_are_refused() -> None:
    with pytest.raises(AlignkitError, match=r"beta of KTO: must be positive, got 0\.0"):
        KTO(beta=0.0)
    with pytest.raises(AlignkitError, match="undesirable_weight of KTO: must be at least 0"):
        KTO(undesirable_weight=-1.0)
    assert KTO.from_dict(KTO(0.3, 2.0).to_dict()) == KTO(0.3, 2.0)


def test_as_a_loss_of_pairs_it_names_its_module() -> None:
    assert str(unknown_loss("kto")) == (
        "model.loss KTO: takes unpaired answers; train it with KTOModule"
    )
