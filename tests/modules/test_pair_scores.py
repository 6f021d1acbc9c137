"""What a module hands to losses that weigh tokens or answers, or that rank more than two."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.nn.functional import logsigmoid

from alignkit.engine import Example, collate, response_sums, score
from alignkit.errors import AlignkitError
from alignkit.lora import LoRAConfig
from alignkit.modules import DPOModule
from alignkit.modules.pair_scores import pair_scores
from alignkit.objectives.preference import DPO, LDDPO, WPO, PlackettLuce
from tests.modules.helpers import loader, pairs, sgd, trainer


def ranks(counts: list[int], seed: int = 0) -> list[Example]:
    """Prompts with so many responses of very different lengths."""
    draw = random.Random(seed)

    def ids(low: int, high: int) -> list[int]:
        return [draw.randrange(1, 384) for _ in range(draw.randint(low, high))]

    return [Example(ids(1, 9), [ids(1, 20) for _ in range(count)]) for count in counts]


def moved(model_dir: Callable, **options: object) -> DPOModule:
    """A module whose policy has left its reference."""
    module = DPOModule(str(model_dir("llama")), **options)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in module.model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    return module


def token_logps(model: torch.nn.Module, example: Example, k: int) -> torch.Tensor:
    """All log-probabilities [L, V] at a response's tokens, by a plain forward."""
    row = torch.tensor([[*example.prompt, *example.responses[k]]])
    return model(row).logits[0].log_softmax(-1)[len(example.prompt) - 1 : -1]


def picked(logp_LV: torch.Tensor, example: Example, k: int) -> torch.Tensor:
    return logp_LV.gather(1, torch.tensor(example.responses[k])[:, None])[:, 0]


def test_ld_dpo_by_plain_forwards(model_dir: Callable) -> None:
    module = moved(model_dir, loss=LDDPO(beta=0.5, alpha=0.3))
    examples = pairs(4)
    expected = torch.zeros(())
    with torch.no_grad():
        for example in examples:
            shorter = min(map(len, example.responses))
            reward = []
            for k in (0, 1):
                ratio = torch.zeros(())
                for sign, model in ((1, module.model), (-1, module.reference.model)):
                    own = picked(token_logps(model, example, k), example, k)
                    ratio += sign * (own[:shorter].sum() + 0.3 * own[shorter:].sum())
                reward.append(0.5 * ratio)
            expected -= logsigmoid(reward[0] - reward[1])
        actual = module.compute_loss(collate(examples)).loss_sum
        plain = moved(model_dir, loss=DPO(beta=0.5)).compute_loss(collate(examples)).loss_sum
        one = moved(model_dir, loss=LDDPO(beta=0.5, alpha=1.0))
        assert torch.equal(one.compute_loss(collate(examples)).loss_sum, plain)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(actual, plain, rtol=1e-3)


@pytest.mark.parametrize("head", ["frozen", "trained"])
def test_wpo_weights_by_plain_forwards(model_dir: Callable, head: str) -> None:
    """exp of the mean of log π(y_t) − log Σ_v π(v)², without gradients."""
    lora = LoRAConfig(targets="all-linear" if head == "frozen" else "lm_head")
    module = moved(model_dir, lora=lora, loss=WPO(DPO(beta=0.5)))
    examples = pairs(4)
    policy = pair_scores(module.model, collate(examples), module.loss)
    for b, example in enumerate(examples):
        for k, weight in enumerate((policy.chosen_weight, policy.rejected_weight)):
            with torch.no_grad():
                logp_LV = token_logps(module.model, example, k)
            gap = picked(logp_LV, example, k) - (2 * logp_LV).logsumexp(-1)
            torch.testing.assert_close(weight[b], gap.mean().exp(), rtol=1e-4, atol=1e-5)
    assert not policy.chosen_weight.requires_grad
    plain = pair_scores(module.model, collate(examples))
    torch.testing.assert_close(policy.chosen, plain.chosen)
    output = module.compute_loss(collate(examples))
    output.loss_sum.backward()
    assert any(p.grad is not None and p.grad.any() for p in module.model.parameters())


def test_k_answers_travel_in_one_row(model_dir: Callable, tmp_path: Path) -> None:
    """Their prompt is there once; the loss is that of plain sums; a run trains and validates."""
    module = moved(model_dir, loss=PlackettLuce(beta=0.5))
    examples = ranks([4, 2, 3])
    batch = collate(examples)
    assert batch.num_tokens == sum(example.num_tokens for example in examples)
    with torch.no_grad():
        ratios = response_sums(score(module.model, batch), batch) - module.reference.sums(batch)
        expected, at = torch.zeros(()), 0
        for example in examples:
            count = len(example.responses)
            rewards = 0.5 * ratios[at : at + count]
            expected -= sum(rewards[i] - rewards[i:].logsumexp(0) for i in range(count))
            at += count
        output = module.compute_loss(batch)
    torch.testing.assert_close(output.loss_sum, expected, rtol=1e-4, atol=1e-5)
    assert output.weight == 3
    fresh = DPOModule(
        str(model_dir("llama")),
        loss=PlackettLuce(),
        reference_cache=str(tmp_path / "cache"),
        optimizer=sgd,
    )
    run = trainer(tmp_path, max_steps=2)
    rows = ranks([2, 3, 4, 2])
    run.fit(fresh, loader(rows, 2), loader(rows, 2))
    assert {
        "val/rewards/accuracies",
        "val/rewards/margins",
        "val/loss",
    } <= run.callback_metrics.keys()


@pytest.mark.parametrize(
    ("counts", "loss", "said"),
    [
        ([3, 1], DPO(), "DPO needs exactly two responses a prompt"),
        ([3], WPO(), "WPO needs exactly two responses a prompt"),
        ([3, 1], PlackettLuce(), "PlackettLuce needs two responses a prompt or more"),
    ],
    ids=str,
)
def test_another_number_of_answers_is_refused(
    model_dir: Callable, counts: list[int], loss: object, said: str
) -> None:
    """Also where the counts of a batch are two on average."""
    module = DPOModule(str(model_dir("gpt2")), loss=loss)
    with pytest.raises(AlignkitError, match=said):
        module.compute_loss(collate(ranks(counts)))


def test_a_cache_of_sums_cannot_weigh_tokens(model_dir: Callable, tmp_path: Path) -> None:
    with pytest.raises(
        AlignkitError, match=r"reference_cache: LDDPO weighs tokens.*; leave it out"
    ):
        DPOModule(str(model_dir("gpt2")), loss=LDDPO(), reference_cache=str(tmp_path))
