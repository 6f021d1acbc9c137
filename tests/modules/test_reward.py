"""Reward models: Bradley–Terry on the last token, and the same rewards in plain transformers."""

from __future__ import annotations

import sys
from collections.abc import Callable
from math import exp, log
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from alignkit.cli import main
from alignkit.engine import Example, collate
from alignkit.errors import AlignkitError
from alignkit.lora import LoRAConfig
from alignkit.models.checkpoint import load_policy
from alignkit.models.reward import rewards
from alignkit.modules import DPOModule, RewardModule
from alignkit.objectives.preference import PairScores
from alignkit.objectives.ranked import RankedScores
from alignkit.objectives.reward import BradleyTerry
from tests.modules.helpers import loader, pairs, trainer

ONE = torch.tensor([4])


def rated(chosen: float, rejected: float) -> PairScores:
    return PairScores(torch.tensor([chosen]), torch.tensor([rejected]), ONE, ONE)


def test_bradley_terry_by_hand() -> None:
    """σ(ln 3) = 3/4; with m = ln 3 the margin ln 9 comes to that; (1 + 2)² at c = ½."""
    assert BradleyTerry()(rated(log(3), 0.0)).item() == pytest.approx(-log(0.75))
    assert BradleyTerry(margin=log(3))(rated(log(9), 0.0)).item() == pytest.approx(-log(0.75))
    loss = BradleyTerry(center=0.5)(rated(1.0, 2.0)).item()
    assert loss == pytest.approx(log(1 + exp(1)) + 4.5)
    ranked = RankedScores.from_ranked(torch.tensor([log(3), log(2), 0.0]), ONE.expand(3), [3])
    assert BradleyTerry()(ranked).item() == pytest.approx(log(3))
    with pytest.raises(AlignkitError, match="margin of BradleyTerry: must be at least 0"):
        BradleyTerry(margin=-1.0)


def test_it_is_trls() -> None:
    trl = pytest.importorskip("trl")
    from collections import defaultdict
    from types import SimpleNamespace

    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(8, 1, generator=generator).requires_grad_()
    identity = SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x)
    trainer_ = SimpleNamespace(
        accelerator=identity,
        model=SimpleNamespace(training=True),
        args=SimpleNamespace(center_rewards_coefficient=0.3),
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
    )
    inputs = {"attention_mask": torch.ones(8, 2), "margin": torch.full((4,), 0.4)}

    def model(**_: object) -> SimpleNamespace:
        return SimpleNamespace(logits=logits)

    theirs = trl.RewardTrainer.compute_loss(trainer_, model, dict(inputs))
    chosen, rejected = logits[:, 0].chunk(2)
    ours = BradleyTerry(0.4, 0.3)(PairScores(chosen, rejected, ONE, ONE)).mean()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    (one,), (two,) = (torch.autograd.grad(x, logits, retain_graph=True) for x in (ours, theirs))
    torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


def test_rewards_are_not_rounded_under_autocast(model_dir: Callable) -> None:
    """Rewards near each other would be equal in bf16, and their pair a tie."""
    module = RewardModule(str(model_dir("llama")), lora=LoRAConfig(r=2))
    with torch.no_grad():
        module.model.reward_head.normal_()
    examples = pairs(16)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        found = rewards(module.model, collate(examples), module.padding)
        summed = module.compute_loss(collate(examples))
    assert found.dtype == summed.loss_sum.dtype == torch.float32
    assert not torch.equal(found, found.bfloat16().float())
    assert all(value.dtype != torch.bfloat16 for value in summed.metrics.values())


def trained(base: Path, directory: Path, **options: object) -> RewardModule:
    torch.manual_seed(0)
    module = RewardModule(
        str(base),
        optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2),
        schedule="constant_with_warmup",
        **options,
    )
    examples = pairs(8)
    run = trainer(directory, max_epochs=4, enable_checkpointing=True)
    run.fit(module, loader(examples, 4), loader(examples, 4))
    assert run.callback_metrics["val/loss"] < log(2) - 0.05
    assert run.callback_metrics["val/rewards/accuracies"] > 0.5
    assert "val/kl" not in run.callback_metrics
    return module


@pytest.mark.parametrize("lora", [LoRAConfig(), None], ids=["lora", "full"])
def test_transformers_gives_the_same_rewards(
    family: str, lora: object, model_dir: Callable, tmp_path: Path
) -> None:
    """By a checkpoint and the export command, for answers with and without an end, in a batch."""
    if lora is None and family != "llama":
        pytest.skip("one family is enough")
    module = trained(model_dir(family), tmp_path / "run", lora=lora)
    (checkpoint,) = (tmp_path / "run").rglob("*.ckpt")
    output = tmp_path / "reward"
    command = ["export", "--model", checkpoint, "--to", "reward", "--output", output]
    assert main([str(argument) for argument in command]) == 0
    plain = AutoModelForSequenceClassification.from_pretrained(output).eval()
    tokenizer = AutoTokenizer.from_pretrained(output)
    examples = [Example([5, 6], [[7, 8, 0], [9]]), Example([4], [[3, 2, 1, 11, 0], [12, 0]])]
    with torch.no_grad():
        ours = rewards(module.model.eval(), collate(examples), module.padding)
        texts = [[*e.prompt, *answer] for e in examples for answer in e.responses]
        padded = tokenizer.pad({"input_ids": texts}, return_tensors="pt")
        theirs = plain(**padded).logits[:, 0]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert ours.std() > 1e-3


def test_a_reward_model_answers_nothing(model_dir: Callable, tmp_path: Path) -> None:
    trained(model_dir("gpt2"), tmp_path / "run")
    (checkpoint,) = (tmp_path / "run").rglob("*.ckpt")
    with pytest.raises(AlignkitError, match="is a reward model, which answers nothing"):
        load_policy(str(checkpoint))
    with pytest.raises(AlignkitError, match="is no checkpoint of a reward model"):
        load_policy(str(model_dir("gpt2")), reward=True)
    with pytest.raises(AlignkitError, match="is a reward model's checkpoint"):
        DPOModule(str(model_dir("gpt2")), init_from=str(checkpoint))


def test_it_starts_at_ln_2_and_takes_ranked_answers(model_dir: Callable) -> None:
    module = RewardModule(str(model_dir("llama")))
    output = module.compute_loss(collate(pairs(5)))
    assert output.loss_sum.item() / 5 == pytest.approx(log(2))
    ranked = collate([Example([1], [[2, 0], [3, 0], [4, 0]])])
    assert module.compute_loss(ranked).loss_sum.item() == pytest.approx(log(6))
    strict = RewardModule(str(model_dir("llama")), loss=BradleyTerry(margin=1.0))
    for module_, batch in ((module, collate([Example([1], [[2]])])), (strict, ranked)):
        with pytest.raises(AlignkitError, match="two answers a prompt or more"):
            module_.compute_loss(batch)


def test_a_model_scored_alone_has_the_same_rewards(
    model_dir: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One sequence a forward, as recurrent models are."""
    module = RewardModule(str(model_dir("llama")))
    torch.nn.init.normal_(module.model.reward_head)
    batch = collate(pairs(3))
    with torch.no_grad():
        packed = rewards(module.model, batch, module.padding)
        engine = sys.modules["alignkit.engine.score"]
        monkeypatch.setattr(engine, "fits_a_row", lambda *_: False)
        alone = rewards(module.model, batch, module.padding)
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-5)


def test_a_response_of_padding_ends_at_its_own_prompt(model_dir: Callable) -> None:
    """Not at a sibling's end, nor at the example's before: rows are scored as if alone."""
    module = RewardModule(str(model_dir("gpt2")))
    torch.nn.init.normal_(module.model.reward_head)
    cases = [
        Example([5, 6], [[7, 0], [0]]),
        Example([], [[8, 9], [0, 0]]),
        Example([3], [[0], [0]]),
    ]
    alone = [
        Example(e.prompt, [answer, [1, 2]]) for e in cases for answer in e.responses
    ]  # fmt: skip
    with torch.no_grad():
        packed = rewards(module.model, collate(cases), padding=0)
        each = [rewards(module.model, collate([e]), padding=0)[0] for e in alone]
    torch.testing.assert_close(packed, torch.stack(each), rtol=1e-4, atol=1e-5)
    asked = rewards(module.model, collate([Example([5], [[6], [6]])]), padding=0)
    assert packed[1] == pytest.approx(asked[0].item(), rel=1e-4)


def test_the_head_stays_fp32(model_dir: Callable, tmp_path: Path) -> None:
    """A learning rate of 1e-4 would round away from weights of 1 in bf16."""
    module = RewardModule(
        str(model_dir("llama")), optimizer=lambda p: torch.optim.AdamW(p, lr=1e-4),
        schedule="constant_with_warmup",
    )  # fmt: skip
    torch.nn.init.ones_(module.model.reward_head)
    trainer(tmp_path, max_steps=2, precision="bf16-true").fit(module, loader(pairs(4), 2))
    assert module.model.lm_head.weight.dtype == torch.bfloat16
    assert module.model.reward_head.dtype == torch.float32
    assert (module.model.reward_head != 1).all()
    module.model.get_parameter("reward_head").data = torch.ones(64).bfloat16()
    with pytest.raises(AlignkitError, match="reward_head trains in half precision"):
        trainer(tmp_path, max_steps=1).fit(module, loader(pairs(4), 2))


@pytest.mark.parametrize(
    "lora", [None, LoRAConfig(targets=["q_proj", "lm_head"])], ids=["full", "lora"]
)
def test_all_that_trains_is_used(lora: object, model_dir: Callable) -> None:
    """Nothing over the vocabulary: DDP waits forever for a gradient that never comes."""
    module = RewardModule(str(model_dir("llama")), lora=lora)
    module.compute_loss(collate(pairs(2))).loss_sum.backward()
    trained = {name: p for name, p in module.model.named_parameters() if p.requires_grad}
    assert {name for name, p in trained.items() if p.grad is None} == set()
    assert not any("lm_head" in name for name in trained)


@pytest.mark.parametrize("lora", [LoRAConfig(), None], ids=["lora", "full"])
def test_a_reward_model_starts_from_another(
    lora: object, model_dir: Callable, tmp_path: Path
) -> None:
    first = trained(model_dir("llama"), tmp_path / "run", lora=lora)
    (checkpoint,) = (tmp_path / "run").rglob("*.ckpt")
    second = RewardModule(str(model_dir("llama")), init_from=str(checkpoint), lora=lora)
    assert first.state_dict().keys() == second.state_dict().keys()
    assert all(torch.equal(v, second.state_dict()[n]) for n, v in first.state_dict().items())
    with pytest.raises(AlignkitError, match=r"init_from .*: is a reward model's checkpoint"):
        DPOModule(str(model_dir("llama")), init_from=str(checkpoint), lora=lora)
