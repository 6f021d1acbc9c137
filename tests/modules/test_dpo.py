"""DPO: ln 2 at the start, a frozen reference that shares storage, a new objective in few lines."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from alignkit.engine import Example, collate, response_lengths, response_sums, score
from alignkit.errors import AlignkitError
from alignkit.lora import LoRAConfig
from alignkit.modules import DPOModule
from alignkit.objectives.preference import DPO, PairScores, SimPO
from tests.modules.helpers import loader, pairs, sgd, trainer


def test_starts_at_ln_2_with_zero_rewards(model_dir: Callable, family: str) -> None:
    module = DPOModule(str(model_dir(family)), lora=LoRAConfig(targets="all-linear"))
    output = module.compute_loss(collate(pairs(5)))
    assert output.weight == 5
    assert output.loss_sum.item() / 5 == pytest.approx(math.log(2), abs=1e-6)
    assert output.metrics["rewards/chosen"].item() == 0
    assert output.metrics["rewards/rejected"].item() == 0


def test_loss_by_plain_forward(model_dir: Callable) -> None:
    """-log sigma(beta ((log pi_w - log ref_w) - (log pi_l - log ref_l))), sequence by sequence."""
    module = DPOModule(
        str(model_dir("llama")), lora=LoRAConfig(targets="all-linear"), loss=DPO(beta=0.5)
    )
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    examples = pairs(3)

    def total(model: torch.nn.Module, example: Example, k: int) -> Tensor:
        row = torch.tensor([[*example.prompt, *example.responses[k]]])
        logp_LV = model(row).logits[0].log_softmax(-1)
        first = len(example.prompt)
        return logp_LV[first - 1 : -1].gather(1, row[0, first:, None]).sum()

    expected = torch.zeros(())
    with torch.no_grad():
        for example in examples:
            margin = sum(
                sign * (total(module.model, example, k) - total(module.reference.model, example, k))
                for k, sign in ((0, 1), (1, -1))
            )
            expected -= torch.nn.functional.logsigmoid(0.5 * margin)
        actual = module.compute_loss(collate(examples)).loss_sum
    assert actual.item() == pytest.approx(expected.item(), rel=1e-4)
    assert abs(actual.item() / 3 - math.log(2)) > 0.01


def test_reference_shares_frozen_storage_and_never_moves(
    model_dir: Callable, tmp_path: Path
) -> None:
    module = DPOModule(str(model_dir("gpt_neox")), lora=LoRAConfig(targets="all-linear"))
    policy = dict(module.model.named_parameters())
    reference = dict(module.reference.model.named_parameters())
    before = {name: value.clone() for name, value in reference.items()}
    assert policy.keys() == reference.keys()
    for name, parameter in policy.items():
        shared = parameter.data_ptr() == reference[name].data_ptr()
        assert shared is not parameter.requires_grad
    assert not any(p.requires_grad for p in reference.values())

    trainer(tmp_path, max_steps=3).fit(module, loader(pairs(6), 2))
    assert all(torch.equal(reference[name], before[name]) for name in before)
    assert any(not torch.equal(policy[name], before[name]) for name in before)
    assert module.model.training and not module.reference.model.training
    assert module.optimizers().optimizer.param_groups[0]["params"]  # type: ignore[union-attr]
    trained = {id(p) for g in module.optimizers().optimizer.param_groups for p in g["params"]}
    assert trained == {id(p) for p in policy.values() if p.requires_grad}


def test_full_fine_tuning_makes_a_second_copy(model_dir: Callable) -> None:
    module = DPOModule(str(model_dir("gpt2")), lora=None)
    for policy, reference in zip(
        module.model.parameters(), module.reference.model.parameters(), strict=True
    ):
        assert policy.data_ptr() != reference.data_ptr()


def test_learns_the_preference(model_dir: Callable, tmp_path: Path) -> None:
    """On six pairs the loss falls well under ln 2 and every pair ends up ranked right."""
    module = DPOModule(
        str(model_dir("gpt2")),
        loss=DPO(beta=1.0),
        optimizer=lambda p: torch.optim.AdamW(p, lr=5e-2),
        schedule="constant_with_warmup",
    )
    run = trainer(tmp_path, max_epochs=30)
    run.fit(module, loader(pairs(6), 3), loader(pairs(6), 3))
    assert run.callback_metrics["val/loss"] < 0.5
    assert run.callback_metrics["val/rewards/accuracies"] == 1.0
    assert run.callback_metrics["val/rewards/margins"] > 0


def test_a_changed_policy_is_stopped_at_step_0(model_dir: Callable, tmp_path: Path) -> None:
    module = DPOModule(str(model_dir("gpt2")))
    with torch.no_grad():
        for parameter in module.model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    with pytest.raises(AlignkitError, match="before the first step"):
        trainer(tmp_path, max_steps=1).fit(module, loader(pairs(2), 2))


def test_adapter_dropout_is_allowed(model_dir: Callable, tmp_path: Path) -> None:
    lora = LoRAConfig(dropout=0.5)
    trainer(tmp_path, max_steps=2).fit(
        DPOModule(str(model_dir("gpt2")), lora=lora), loader(pairs(4), 2)
    )


def test_one_response_is_refused(model_dir: Callable) -> None:
    module = DPOModule(str(model_dir("gpt2")))
    with pytest.raises(AlignkitError, match="exactly two responses"):
        module.compute_loss(collate([Example([1], [[2]])]))


class Weighted(DPOModule):
    """A loss whose gradient needs the reference's own values."""

    def preference_loss(self, policy: PairScores, reference: PairScores) -> Tensor:
        return policy.chosen * reference.chosen - policy.rejected * reference.rejected


def test_the_reference_is_scored_in_inference_mode_and_any_loss_may_use_it(
    model_dir: Callable,
) -> None:
    module = Weighted(str(model_dir()), lora=LoRAConfig(r=2))
    seen: list[bool] = []
    module.reference.model.base_model.register_forward_pre_hook(
        lambda *_: seen.append(torch.is_inference_mode_enabled())
    )
    module.compute_loss(collate(pairs(2))).loss_sum.backward()
    assert seen
    assert all(seen)
    assert any(p.grad is not None and p.grad.any() for p in module.model.parameters())


class SquaredMargin(DPOModule):
    """A new objective: the squared distance of the margin to a target (the form of IPO)."""

    def __init__(self, base: str, target: float = 2.0, **kwargs: object) -> None:
        super().__init__(base, **kwargs)
        self.target = target

    def preference_loss(self, policy: PairScores, reference: PairScores) -> Tensor:
        """Return (margin - target)^2."""
        chosen = policy.chosen - reference.chosen
        rejected = policy.rejected - reference.rejected
        return (chosen - rejected - self.target) ** 2


def test_a_new_objective(model_dir: Callable, tmp_path: Path) -> None:
    """Starts at target^2 = 4 and falls."""
    module = SquaredMargin(str(model_dir("gpt2")), optimizer=sgd)
    batch = collate(pairs(4))
    assert module.compute_loss(batch).loss_sum.item() / 4 == pytest.approx(4.0)
    trainer(tmp_path, max_steps=4).fit(module, loader(pairs(4) * 4, 4))
    assert module.compute_loss(batch).loss_sum.item() / 4 < 3.9


def test_a_loss_without_a_reference_keeps_and_scores_none(
    model_dir: Callable, tmp_path: Path
) -> None:
    """No copy, no pass: every forward is the policy's own, and rewards are what SimPO compares."""
    module = DPOModule(str(model_dir("gpt2")), loss=SimPO(beta=2.0, gamma=0.7), optimizer=sgd)
    assert module.reference is None
    assert not any(name.startswith("reference") for name, _ in module.named_parameters())
    batch = collate(pairs(5))
    output = module.compute_loss(batch)
    sums = response_sums(score(module.model, batch), batch) / response_lengths(batch)
    margin = 2.0 * (sums[0::2] - sums[1::2])
    torch.testing.assert_close(output.loss_sum, -logsigmoid(margin - 0.7).sum())
    torch.testing.assert_close(output.metrics["rewards/margins"], margin.sum().detach())
    trainer(tmp_path, max_steps=2).fit(module, loader(pairs(8), 4), loader(pairs(4), 4))
    with pytest.raises(AlignkitError, match="SimPO uses no reference; leave it out"):
        DPOModule(str(model_dir("gpt2")), loss=SimPO(), reference_cache=str(tmp_path))


class WithLengths(DPOModule):
    """DPO that also logs the length of what was chosen."""

    def metrics(self, policy: PairScores, reference: PairScores) -> dict[str, Tensor]:
        own = {"tokens/chosen": policy.chosen_tokens.sum()}
        assert not torch.is_grad_enabled()
        return {**super().metrics(policy, reference), **own}


def test_a_subclass_logs_metrics_of_its_own(model_dir: Callable, tmp_path: Path) -> None:
    """Sums over pairs become means over the pairs of a window, and of the validation."""
    module = WithLengths(str(model_dir("gpt2")), optimizer=sgd)
    examples = pairs(6)
    mean = sum(len(example.responses[0]) for example in examples) / 6
    run = trainer(tmp_path, max_steps=1, accumulate_grad_batches=2)
    run.fit(module, loader(examples, 4), loader(examples, 4))
    assert run.callback_metrics["train/tokens/chosen"].item() == pytest.approx(mean)
    assert run.callback_metrics["val/tokens/chosen"].item() == pytest.approx(mean)
    assert "train/rewards/margins" in run.callback_metrics
