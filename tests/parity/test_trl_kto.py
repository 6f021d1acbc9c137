"""KTO against the installed trl's KTOTrainer, values and gradients.

``_compute_loss`` is called unbound on a stand-in trainer and a stand-in model, so that what is
compared is trl's own code and nothing but the loss.
"""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from alignkit.objectives.unpaired import KTO, UnpairedScores

trl = pytest.importorskip("trl")

ROWS, LENGTH = 7, 12


class _Model:
    training = True

    def __init__(self, log_probs: Tensor) -> None:
        zeros = torch.zeros_like(log_probs)
        self.outputs = SimpleNamespace(log_probs=log_probs, entropy=zeros, mean_logits=zeros)

    def __call__(self, **_: object) -> SimpleNamespace:
        return self.outputs


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.5, 0.4)])
@pytest.mark.parametrize("rise", [3.0, -3.0])  # of mismatched answers, so that z₀ > 0 or clamped
def test_same_value_and_gradient(rise: float, weights: tuple[float, float], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    policy = (-4 * torch.rand(ROWS, LENGTH - 1, generator=generator)).requires_grad_()
    reference = (policy.detach() + torch.randn(ROWS, LENGTH - 1, generator=generator)).sum(1)
    reference_kl = -20 * torch.rand(ROWS, generator=generator)
    policy_kl = reference_kl + rise + torch.randn(ROWS, generator=generator)
    good = torch.rand(ROWS, generator=generator) > 0.4
    good[:2] = torch.tensor([True, False])
    identity = SimpleNamespace(
        device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x
    )
    trainer = SimpleNamespace(
        accelerator=identity,
        model=SimpleNamespace(training=True),
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        calculate_KL=True,
        loss_type="kto",
        beta=0.2,
        desirable_weight=weights[0],
        undesirable_weight=weights[1],
        _compute_kl_logps=lambda model, batch: policy_kl,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
    )
    ones = torch.ones(ROWS, LENGTH, dtype=torch.long)
    inputs = {
        "input_ids": ones,
        "attention_mask": ones,
        "completion_mask": ones,
        "label": good,
        "ref_logps": reference,
        "ref_KL_logps": reference_kl,
    }
    theirs = trl.KTOTrainer._compute_loss(trainer, _Model(policy), inputs, return_outputs=False)
    loss = KTO(0.2, *weights)
    scores = UnpairedScores(policy.sum(1), policy_kl, good)
    ours = loss(scores, UnpairedScores(reference, reference_kl, good)).mean()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    gradients = (torch.autograd.grad(each, policy, retain_graph=True)[0] for each in (ours, theirs))
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-7)
    (kl,) = trainer._metrics["train"]["kl"]
    assert kl == pytest.approx(loss.point(policy_kl - reference_kl).item(), rel=1e-5)
