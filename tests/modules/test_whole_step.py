"""Losses that compare pairs: a step of many micro-batches is a step over one batch of all pairs."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from alignkit.engine import Example, collate
from alignkit.errors import AlignkitError
from alignkit.lora import LoRAConfig
from alignkit.modules import DPOModule
from alignkit.objectives.preference import (
    AOT,
    DPO,
    PlackettLuce,
    PreferenceLoss,
    UnpairedAOT,
    WeightedSum,
)
from tests.modules.helpers import loader, logged_steps, sgd, trainer


def alike(count: int) -> list[Example]:
    """Pairs of one length, whose margins policy and reference order differently."""
    draw = random.Random(3)

    def ids() -> list[int]:
        return [draw.randrange(1, 384) for _ in range(9)]

    return [Example(ids(), [ids(), ids()]) for _ in range(count)]


def moved(model_dir: Callable, loss: PreferenceLoss, **options: object) -> DPOModule:
    """A policy that has left its reference, so that margins have an order."""
    torch.manual_seed(0)
    module = DPOModule(
        str(model_dir("gpt2")), loss=loss, optimizer=sgd, schedule="constant_with_warmup", **options
    )
    with torch.no_grad():
        for parameter in module.model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.5)
    module.reference._agreed = True
    return module


@pytest.mark.parametrize(
    "loss", [AOT(0.5), UnpairedAOT(0.5), WeightedSum((DPO(0.5), AOT(0.2)), (1.0, 2.0))], ids=repr
)
def test_micro_batches_are_one_batch(
    loss: PreferenceLoss, model_dir: Callable, tmp_path: Path
) -> None:
    """Two steps of three and of two micro-batches, against batches of all their pairs."""
    module = moved(model_dir, loss)
    whole = copy.deepcopy(module)
    start = {n: p.clone() for n, p in module.state_dict().items()}
    logged, expected = logged_steps(module), logged_steps(whole)
    examples = alike(10)
    trainer(tmp_path, max_epochs=1, accumulate_grad_batches=3).fit(module, loader(examples, 2))
    trainer(tmp_path, max_epochs=1).fit(whole, loader(examples, 6))
    for name, value in whole.state_dict().items():
        moved_by = (value - start[name]).abs().max().item()
        torch.testing.assert_close(
            module.state_dict()[name], value, atol=1e-5 + 3e-3 * moved_by, rtol=1e-3
        )
    assert any(not torch.equal(value, start[name]) for name, value in whole.state_dict().items())
    for name in ("train/loss", "train/grad_norm", "train/rewards/margins"):
        assert logged[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-5), name
    assert module._step_scores == []


def test_a_mean_over_micro_batches_is_another_loss(model_dir: Callable) -> None:
    """Why: sorted within micro-batches, the loss of the same pairs differs."""
    module, examples = moved(model_dir, AOT(5.0)), alike(6)
    with torch.no_grad():
        together = module.compute_loss(collate(examples)).loss_sum
        apart = sum(module.compute_loss(collate(examples[i : i + 2])).loss_sum for i in (0, 2, 4))
    assert abs(together - apart) > 0.01 * together


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
def test_dropout_is_drawn_once(model_dir: Callable, tmp_path: Path) -> None:
    """The second pass repeats the first one's masks: two runs of one seed are equal."""
    ends = []
    for checkpointing in (False, True):
        module = moved(
            model_dir,
            AOT(0.5),
            lora=LoRAConfig(dropout=0.5),
            activation_checkpointing=checkpointing,
        )
        torch.manual_seed(4)
        trainer(tmp_path, max_steps=2, accumulate_grad_batches=2).fit(module, loader(alike(8), 2))
        ends.append(module.state_dict())
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, atol=1e-6, rtol=1e-5)


def test_ranks_and_steps_are_not_mixed() -> None:
    with pytest.raises(AlignkitError, match="rank k answers at once"):
        WeightedSum((AOT(), PlackettLuce()))
