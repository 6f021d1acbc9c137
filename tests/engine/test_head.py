"""The head's log-probs, statistics and gradients against log_softmax over whole logits."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from alignkit.engine import head as head_module
from alignkit.engine.head import token_scores


def case(scale: float, bias: bool) -> tuple[nn.Linear, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    head = nn.Linear(12, 50, bias=bias)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    hidden = torch.randn(41, 12, generator=generator).requires_grad_()
    return head, hidden, torch.randint(0, 50, (41,), generator=generator)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("scale", [0.5, 40.0])
def test_token_scores_equal_log_softmax(
    trained: bool, bias: bool, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """41 tokens in chunks of 16 and parts of 5; at scale 40 most probabilities underflow."""
    monkeypatch.setattr(head_module, "CHUNK", 16)
    monkeypatch.setattr(head_module, "CACHED", 5)
    head, hidden, target = case(scale, bias)
    head.requires_grad_(trained)
    scores = token_scores(head, hidden, target, stats=True)

    logp = copy.deepcopy(head).double()(hidden.double()).log_softmax(-1)
    expected = logp.gather(1, target[:, None])[:, 0]
    assert scores.logps.dtype == torch.float32
    # fp32 logits of some hundreds are themselves rounded by 2e-5.
    tolerance = 1e-5 * max(scale / 10, 1)
    torch.testing.assert_close(scores.logps, expected.float(), atol=tolerance, rtol=1e-5)
    assert scale < 1 or expected.min() < -110  # below the logarithm of any fp32 number
    assert scores.correct is not None and scores.entropy is not None
    assert torch.equal(scores.correct, logp.argmax(-1) == target)
    entropy = torch.distributions.Categorical(logits=logp).entropy()
    torch.testing.assert_close(scores.entropy, entropy.float(), atol=1e-4, rtol=1e-4)

    weights = torch.linspace(-1, 1, 41)
    (expected_grad,) = torch.autograd.grad(expected @ weights.double(), hidden)
    (actual_grad,) = torch.autograd.grad(scores.logps @ weights, hidden)
    torch.testing.assert_close(actual_grad, expected_grad, atol=1e-5 * scale, rtol=1e-5)


@pytest.mark.parametrize("trained", [False, True])
def test_nothing_to_score(trained: bool) -> None:
    head, _, _ = case(1.0, False)
    head.requires_grad_(trained)
    scores = token_scores(head, torch.empty(0, 12), torch.empty(0, dtype=torch.int64), stats=True)
    assert scores.logps.shape == (0,)
    assert scores.correct is not None and scores.correct.shape == (0,)


@pytest.mark.parametrize("biased", [False, True])
def test_exact_logits_are_the_products_of_bf16_values(biased: bool) -> None:
    """Against float64 with the same values: 1e-5 where rounded logits are off by 1e-2."""
    torch.manual_seed(0)
    head = nn.Linear(64, 5000, bias=biased).bfloat16().requires_grad_(False)
    hidden_ND = (3 * torch.randn(300, 64)).bfloat16().requires_grad_()
    target_N = torch.randint(5000, (300,))
    wide = copy.deepcopy(head).double()
    truth = wide(hidden_ND.detach().double()).log_softmax(-1).gather(1, target_N[:, None])[:, 0]
    exact = token_scores(head, hidden_ND, target_N, exact=True).logps
    rounded = token_scores(head, hidden_ND, target_N).logps
    assert (exact - truth).abs().max() < 1e-5
    assert (rounded - truth).abs().max() > 1e-3
    ours, theirs = (torch.autograd.grad(each.sum(), hidden_ND)[0] for each in (exact, rounded))
    assert (ours - theirs).float().norm() < 0.01 * theirs.float().norm()
