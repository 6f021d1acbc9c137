"""Logits as the model itself makes them, from the scored positions alone: values and gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedModel

from alignkit.engine import check_engine, collate, score, score_with_stats
from alignkit.engine import head as head_module
from alignkit.engine.head import Curve, token_scores
from alignkit.engine.tail import _CURVE, _OWN_CODE
from tests.engine.families import tiny_config, tiny_family
from tests.engine.test_families import EXAMPLES, plain_scores
from tests.engine.test_row import assert_same_gradients

# The curve that each head should be found to have.
CURVES = {
    "llama": Curve(),
    "opt": Curve(),  # its head passes over what wraps the decoder
    "gemma2": Curve(cap=30.0),
    "nanochat": Curve(cap=15.0),
    "granite+scaled": Curve(scale=0.25),
    "cohere": Curve(scale=0.0625),
    "minicpm3": Curve(scale=8.0),
}


pytestmark = pytest.mark.usefixtures("quiet_transformers")


def assert_exact(model: PreTrainedModel) -> None:
    """Scores, and gradients of everything that is trained, against plain forwards."""
    check_engine(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    truth = plain_scores(model)
    scores = score(model, collate(EXAMPLES))
    # Some log-probs are -100 nats, of which fp32 keeps seven digits.
    torch.testing.assert_close(scores, truth, atol=1e-5, rtol=1e-6)
    weights = torch.randn(len(scores), generator=torch.Generator().manual_seed(1))
    results: list[list[Tensor]] = []
    for values in (scores, truth):
        grads = torch.autograd.grad(values @ weights, trained, allow_unused=True)
        results.append([torch.zeros(1) if grad is None else grad for grad in grads])
    assert_same_gradients(*results)


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("kind", CURVES)
def test_curved_heads_are_exact(kind: str, frozen: bool) -> None:
    """Each was refused: the logits are not the head's product alone."""
    model = tiny_family(kind)
    if frozen:
        model.get_output_embeddings().requires_grad_(False)
    assert_exact(model)
    found, expected = getattr(model, _CURVE), CURVES[kind]
    assert found.scale == pytest.approx(expected.scale, rel=1e-6)
    assert (found.cap or 0.0) == pytest.approx(expected.cap or 0.0, rel=1e-6)


class ShiftedHead(LlamaForCausalLM):
    """Logits of a head that is more than a curve: a trained factor a word, and a square."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.factors = nn.Parameter(torch.linspace(0.5, 1.5, config.vocab_size))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * self.factors + 0.1 * output.logits.square()
        return output


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_any_other_tail_is_the_models_own_code(
    frozen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head_module, "CHUNK", 16)
    torch.manual_seed(0)
    model = ShiftedHead(tiny_config("llama")).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    if frozen:
        model.lm_head.requires_grad_(False)
        model.factors.requires_grad_(False)
    assert_exact(model)
    assert getattr(model, _CURVE) == _OWN_CODE
    # A copy runs its own code, not that of the model it was copied from.
    other = copy.deepcopy(model)
    before = score(model, collate(EXAMPLES))
    with torch.no_grad():
        other.factors.mul_(2.0)
    assert (score(other, collate(EXAMPLES)) - before).abs().max() > 0.1
    assert torch.equal(score(model, collate(EXAMPLES)), before)


def test_a_hooked_head_is_run_with_its_hooks(
    tiny_model: Callable[..., PreTrainedModel], family: str
) -> None:
    """A frozen head's weight alone would leave the hook out."""
    model = tiny_model(family).requires_grad_(False)
    model.get_output_embeddings().register_forward_hook(lambda *args: args[2] * 1.5)
    check_engine(model)
    with torch.no_grad():
        torch.testing.assert_close(
            score(model, collate(EXAMPLES)), plain_scores(model), atol=1e-5, rtol=0
        )


@pytest.mark.parametrize("curve", [Curve(scale=0.3), Curve(scale=2.0, cap=5.0)])
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_curves_in_float64(curve: Curve, frozen: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against log_softmax over whole logits, statistics included, in chunks of 16, parts of 5."""
    monkeypatch.setattr(head_module, "CHUNK", 16)
    monkeypatch.setattr(head_module, "CACHED", 5)
    generator = torch.Generator().manual_seed(0)
    head = nn.Linear(12, 50)
    hidden = torch.randn(41, 12, generator=generator).requires_grad_()
    target = torch.randint(0, 50, (41,), generator=generator)
    head.requires_grad_(not frozen)
    scores = token_scores(head, hidden, target, stats=True, curve=curve)
    z = copy.deepcopy(head).double()(hidden.double()) * curve.scale
    logits = z if curve.cap is None else curve.cap * torch.tanh(z / curve.cap)
    logp = logits.log_softmax(-1)
    expected = logp.gather(1, target[:, None])[:, 0]
    torch.testing.assert_close(scores.logps, expected.float(), atol=1e-5, rtol=0)
    assert scores.correct is not None and scores.entropy is not None
    assert torch.equal(scores.correct, logp.argmax(-1) == target)
    entropy = torch.distributions.Categorical(logits=logp).entropy()
    torch.testing.assert_close(scores.entropy, entropy.float(), atol=1e-5, rtol=0)
    weights = torch.linspace(-1, 1, 41)
    (expected_grad,) = torch.autograd.grad(expected @ weights.double(), hidden)
    (actual_grad,) = torch.autograd.grad(scores.logps @ weights, hidden)
    torch.testing.assert_close(actual_grad, expected_grad, atol=1e-5, rtol=0)


def test_statistics_are_those_of_the_capped_logits() -> None:
    model = tiny_family("gemma2").requires_grad_(False)
    example = EXAMPLES[3]
    scores = score_with_stats(model, collate([example]))
    row = torch.tensor([[*example.prompt, *example.responses[0]]])
    logits = model(row, use_cache=False).logits[0, len(example.prompt) - 1 : -1]
    assert scores.correct is not None and scores.entropy is not None
    assert torch.equal(scores.correct, logits.argmax(-1) == row[0, len(example.prompt) :])
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    torch.testing.assert_close(scores.entropy, entropy, atol=1e-4, rtol=0)


def test_in_bf16_a_cap_is_no_further_from_fp32_than_the_models_own() -> None:
    model = tiny_family("gemma2").to(torch.bfloat16).requires_grad_(False)
    check_engine(model)
    with torch.no_grad():
        ours = score(model, collate(EXAMPLES))
        own = plain_scores(model).float()
        truth = plain_scores(model.float())
    assert (ours - truth).square().mean() <= 1.2 * (own - truth).square().mean()
