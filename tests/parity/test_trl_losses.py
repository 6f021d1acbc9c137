"""Our preference losses against those of the installed trl, values and gradients.

trl computes its losses inline in ``DPOTrainer._compute_loss``. It is called here unbound, on a
stand-in trainer and a stand-in model that returns chosen token log-probabilities, so what is
compared is trl's own code and nothing but the loss.

Where trl 1.16 and alignkit differ on purpose: trl's ``sigmoid`` and ``sigmoid_norm`` ignore
``label_smoothing`` (ours are cDPO), and its ``discopop`` is nan from βΔ ≈ −89 on.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from alignkit.objectives.preference import (
    CPO,
    DPO,
    LDDPO,
    ORPO,
    WPO,
    AlphaDPO,
    AlphaPO,
    ChosenNLL,
    DiscoPOP,
    ForwardKLDPO,
    Hinge,
    JensenShannonDPO,
    PairScores,
    PreferenceLoss,
    SimPO,
    WeightedSum,
    known_losses,
)

trl = pytest.importorskip("trl")

PAIRS, PROMPT, LENGTH = 6, 4, 24
OURS = {
    kind.trl_name: kind
    for kind in known_losses()
    if kind.trl_name and kind.__module__.startswith("alignkit.")
}
SMOOTHED = {"robust", "exo_pair", "aot", "aot_unpaired"}


def _loss(name: str, beta: float, label_smoothing: float = 0.0) -> PreferenceLoss:
    smoothing = {"label_smoothing": label_smoothing} if name in SMOOTHED else {}
    return OURS[name](beta=beta, **smoothing)


class _Model:
    """Returns prescribed token log-probabilities whatever it is asked."""

    training = True

    def __init__(self, log_probs: Tensor, collision: Tensor | None = None) -> None:
        zeros = torch.zeros_like(log_probs)
        self.outputs = SimpleNamespace(
            log_probs=log_probs,
            entropy=zeros,
            mean_logits=zeros,
            is_top1=zeros.bool(),
            log_sum_sq_probs=collision,
        )

    def __call__(self, **_: Any) -> SimpleNamespace:
        return self.outputs


def _batch(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Policy and reference token log-probs [2B, L-1] (zero off the completion) and the mask."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, LENGTH - PROMPT, (2 * PAIRS, 1), generator=generator)
    position = torch.arange(LENGTH)
    mask = (position >= PROMPT) & (position < PROMPT + lengths)
    draw = [-4 * torch.rand(2 * PAIRS, LENGTH - 1, generator=generator) for _ in range(2)]
    policy, reference = (logps * mask[:, 1:] for logps in draw)
    return policy.requires_grad_(), reference, mask.long()


def _trl_loss(
    name: str,
    policy: Tensor,
    reference: Tensor,
    mask: Tensor,
    beta: float,
    label_smoothing: float = 0.0,
    collision: Tensor | None = None,
    **settings: Any,
) -> Tensor:
    identity = SimpleNamespace(
        device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x
    )
    trainer = SimpleNamespace(
        accelerator=identity,
        model=SimpleNamespace(training=True),
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=[name],
        loss_weights=[1.0],
        beta=beta,
        label_smoothing=label_smoothing,
        args=SimpleNamespace(discopop_tau=0.05),
        use_weighting=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
    )
    vars(trainer).update(settings)
    ref_chosen, ref_rejected = reference.sum(1).chunk(2)
    inputs = {
        "input_ids": torch.zeros_like(mask),
        "attention_mask": torch.ones_like(mask),
        "completion_mask": mask,
        "ref_chosen_logps": ref_chosen,
        "ref_rejected_logps": ref_rejected,
    }
    return trl.DPOTrainer._compute_loss(
        trainer, _Model(policy, collision), inputs, return_outputs=False
    )


def _pair_scores(logps: Tensor, mask: Tensor) -> PairScores:
    chosen, rejected = logps.sum(1).chunk(2)
    return PairScores(chosen, rejected, *mask[:, 1:].sum(1).chunk(2))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("beta", [0.1, 0.7])
@pytest.mark.parametrize("name", sorted(OURS))
def test_same_value_and_gradient(name: str, beta: float, seed: int) -> None:
    label_smoothing = 0.1 if name in SMOOTHED else 0.0
    policy, reference, mask = _batch(seed)
    theirs = _trl_loss(name, policy, reference, mask, beta, label_smoothing)
    (their_gradient,) = torch.autograd.grad(theirs, policy)
    loss = _loss(name, beta, label_smoothing)
    ours = loss(_pair_scores(policy, mask), _pair_scores(reference, mask)).mean()
    (our_gradient,) = torch.autograd.grad(ours, policy)
    torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=1e-7)
    torch.testing.assert_close(our_gradient, their_gradient, rtol=1e-5, atol=1e-7)


def test_we_have_every_preference_loss_of_dpo_trainer() -> None:
    """All names in trl's error message but ``sft``: `ChosenNLL`, which weighs answers alike."""
    with pytest.raises(ValueError, match="Unknown loss type") as error:
        _trl_loss("nothing", *_batch(0), beta=0.1, label_smoothing=0.0)
    named = {word.strip("'\"[],. ") for word in str(error.value).split("one of")[1].split()}
    assert named - set(OURS) == {"sft"}


def test_trl_ignores_label_smoothing_in_sigmoid() -> None:
    """Why `DPO` is compared at ε = 0: trl returns the same loss for every ε, we do not."""
    policy, reference, mask = _batch(0)
    plain, smoothed = (_trl_loss("sigmoid", policy, reference, mask, 0.1, e) for e in (0.0, 0.3))
    assert plain == smoothed
    loss = DPO(beta=0.1, label_smoothing=0.3)
    ours = loss(_pair_scores(policy, mask), _pair_scores(reference, mask))
    assert ours.mean() > plain


def _same(ours: Tensor, theirs: Tensor, policy: Tensor) -> None:
    """Compare values, and gradients by the policy's token log-probs."""
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    gradients = (torch.autograd.grad(loss, policy, retain_graph=True)[0] for loss in (ours, theirs))
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("loss", "settings"),
    [
        (ForwardKLDPO(0.3), {"f_divergence_type": "forward_kl"}),
        (JensenShannonDPO(0.3), {"f_divergence_type": "js_divergence"}),
        *(
            (
                AlphaDPO(0.3, alpha=alpha),
                {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1 - alpha},
            )
            for alpha in (0.1, 0.5, 0.9)
        ),
    ],
    ids=repr,
)
def test_divergences(loss: PreferenceLoss, settings: dict[str, Any], seed: int) -> None:
    policy, reference, mask = _batch(seed)
    # Near its reference, where trl's unclamped forward KL is finite as well.
    near = (reference + 0.02 * policy).detach().requires_grad_()
    theirs = _trl_loss("sigmoid", near, reference, mask, 0.3, **settings)
    ours = loss(_pair_scores(near, mask), _pair_scores(reference, mask)).mean()
    _same(ours, theirs, near)


def _token_weights(loss: LDDPO, mask: Tensor) -> Tensor:
    """The weights of tokens [2B, L-1], chosen answers first; 0 off the completion."""
    own = mask[:, 1:].sum(1, keepdim=True)
    other = own.roll(PAIRS, 0)
    place = mask[:, 1:].cumsum(1) - 1
    return loss.token_weights(place, own, other) * mask[:, 1:]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_length_desensitised(alpha: float, seed: int) -> None:
    drawn, reference, mask = _batch(seed)
    policy = drawn * mask[:, 1:]  # trl counts zeros behind a completion too
    loss = LDDPO(0.3, alpha=alpha)
    weights = _token_weights(loss, mask)
    theirs = _trl_loss("sigmoid", policy, reference * weights, mask, 0.3, ld_alpha=alpha)
    scores = _pair_scores(policy * weights, mask), _pair_scores(reference * weights, mask)
    _same(loss(*scores).mean(), theirs, drawn)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", ["sigmoid", "ipo", "nca_pair"])
def test_wpo_weights(name: str, seed: int) -> None:
    policy, reference, mask = _batch(seed)
    generator = torch.Generator().manual_seed(seed)
    collision = -3 * torch.rand(policy.shape, generator=generator)
    theirs = _trl_loss(name, policy, reference, mask, 0.3, use_weighting=True, collision=collision)
    gaps = (policy.detach() - collision) * mask[:, 1:]
    weights = (gaps.sum(1) / mask[:, 1:].sum(1)).exp().chunk(2)
    scores = _pair_scores(policy, mask)
    scores = replace(scores, chosen_weight=weights[0], rejected_weight=weights[1])
    ours = WPO(_loss(name, 0.3))(scores, _pair_scores(reference, mask)).mean()
    _same(ours, theirs, policy)


@pytest.mark.parametrize("seed", range(3))
def test_weighted_sums(seed: int) -> None:
    """The mean over a batch of answers of one length, at which both count tokens alike."""
    policy, reference, mask = _batch(seed)
    mask = mask * 0
    mask[:, PROMPT : PROMPT + 5] = 1
    drawn = policy.detach().requires_grad_()
    policy = drawn * mask[:, 1:]
    names, weights = ["sigmoid", "sft", "hinge"], [0.8, 0.5, 2.0]
    theirs = _trl_loss("", policy, reference, mask, 0.2, loss_types=names, loss_weights=weights)
    loss = WeightedSum((DPO(0.2), ChosenNLL(), Hinge(0.2)), tuple(weights))
    _same(loss(_pair_scores(policy, mask), _pair_scores(reference, mask)).mean(), theirs, drawn)


@pytest.mark.parametrize("alpha", [0.25, -0.5])
def test_cpo_and_alphapo_of_trls_experimental_trainer(alpha: float) -> None:
    cpo = pytest.importorskip("trl.experimental.cpo")
    policy, _, mask = _batch(2)
    scores = _pair_scores(policy, mask)
    mean = scores.per_token()
    common = {
        "accelerator": SimpleNamespace(device=torch.device("cpu")),
        "simpo_gamma": 1.0,
        "beta": 2.0,
        "label_smoothing": 0.1,
    }
    trainer = SimpleNamespace(**common, loss_type="sigmoid", alpha=0.0)
    theirs, *_ = cpo.CPOTrainer.cpo_loss(trainer, scores.chosen, scores.rejected)
    ours = CPO(beta=2.0, alpha=0.0, label_smoothing=0.1)(scores, scores)
    _same(ours.sum(), theirs.sum(), policy)
    both = CPO(beta=2.0, alpha=0.7, label_smoothing=0.1)(scores, scores)
    torch.testing.assert_close(both, theirs - 0.7 * mean.chosen)

    trainer = SimpleNamespace(**common, loss_type="simpo", alpha=alpha)
    theirs, *_ = cpo.CPOTrainer.cpo_loss(trainer, mean.chosen, mean.rejected)
    ours = AlphaPO(beta=2.0, alpha=alpha, gamma=1.0, label_smoothing=0.1)(scores, scores)
    _same(ours.sum(), theirs.sum(), policy)


def test_simpo_and_orpo_of_trls_experimental_trainers() -> None:
    """simpo in CPOTrainer, the odds ratio in ORPOTrainer, each given the same mean log-probs."""
    cpo = pytest.importorskip("trl.experimental.cpo")
    orpo = pytest.importorskip("trl.experimental.orpo")
    policy, _, mask = _batch(1)
    scores = _pair_scores(policy, mask)
    mean = scores.per_token()
    accelerator = SimpleNamespace(device=torch.device("cpu"))
    trainer = SimpleNamespace(
        accelerator=accelerator,
        loss_type="simpo",
        simpo_gamma=1.0,
        beta=2.0,
        label_smoothing=0.1,
        alpha=0.0,
    )
    theirs, *_ = cpo.CPOTrainer.cpo_loss(trainer, mean.chosen, mean.rejected)
    ours = SimPO(beta=2.0, gamma=1.0, label_smoothing=0.1)(scores, scores)
    torch.testing.assert_close(ours, theirs)

    log_odds, *_ = orpo.ORPOTrainer.odds_ratio_loss(trainer, mean.chosen, mean.rejected)
    ours = ORPO(beta=2.0)(scores, scores)
    torch.testing.assert_close(ours, -mean.chosen - log_odds)


def test_discopop_is_finite_where_trls_is_not() -> None:
    """βΔ = −200: trl multiplies a gate of 0 by e^200 = ∞; ours is the logistic part, 200."""
    policy = torch.full((2, 1), -100.0)
    policy[0] -= 2000.0
    policy.requires_grad_()
    reference, mask = torch.full((2, 1), -100.0), torch.tensor([[0, 1], [0, 1]])
    assert _trl_loss("discopop", policy, reference, mask, 0.1, 0.0).isnan()
    ours = DiscoPOP(beta=0.1)(_pair_scores(policy, mask), _pair_scores(reference, mask))
    assert ours.item() == pytest.approx(200.0)
