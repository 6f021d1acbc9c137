"""The optimised loss is the mean over every scored token of the window, exactly."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from alignkit.errors import AlignkitError
from alignkit.modules import SFTModule
from tests.modules.helpers import answers, loader, plain_cross_entropy_steps, sgd, trainer


@pytest.mark.parametrize("accumulate", [1, 3])
def test_updates_equal_one_big_batch(
    model_dir: Callable[[str], Path], family: str, tmp_path: Path, accumulate: int
) -> None:
    """Seven micro-batches of unequal tokens, the last window one third full."""
    lora = {"targets": "all-linear", "alpha": 64}
    module = SFTModule(
        str(model_dir(family)), lora=lora, optimizer=sgd, schedule="constant_with_warmup"
    )
    torch.manual_seed(1)
    with torch.no_grad():  # B = 0 would hide errors in A's gradient
        for parameter in module.model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.05)
    plain = copy.deepcopy(module.model).train()
    examples = answers(14)
    size = 2 * accumulate
    windows = [examples[i : i + size] for i in range(0, 14, size)]
    losses = plain_cross_entropy_steps(plain, windows)

    logged: list[dict[str, Any]] = []
    run = trainer(tmp_path, max_epochs=1, accumulate_grad_batches=accumulate)
    module.log = lambda name, value, **_: logged.append({name: value})  # type: ignore[method-assign]
    run.fit(module, loader(examples, 2))

    expected = dict(plain.named_parameters())
    for name, parameter in module.model.named_parameters():
        torch.testing.assert_close(parameter, expected[name], atol=1e-6, rtol=1e-5)
    step_losses = [float(entry["train/loss"]) for entry in logged if "train/loss" in entry]
    assert step_losses == pytest.approx(losses, rel=1e-5)


def test_gradient_clipping_sees_the_mean(model_dir: Callable[[str], Path], tmp_path: Path) -> None:
    """Clipped at a tenth of its norm, one SGD step moves by lr x that norm."""
    module = SFTModule(str(model_dir("gpt2")), optimizer=sgd, schedule="constant_with_warmup")
    before = [p.detach().clone() for p in module.model.parameters() if p.requires_grad]
    trainer(tmp_path, max_steps=1, gradient_clip_val=1e-3).fit(module, loader(answers(4), 4))
    after = [p for p in module.model.parameters() if p.requires_grad]
    moved = torch.stack([(a - b).norm() for a, b in zip(after, before, strict=True)]).norm()
    assert moved.item() == pytest.approx(0.1 * 1e-3, rel=1e-3)


def test_full_fine_tuning_trains_everything(
    model_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    """``lora=None`` moves every weight, the tied head through the recomputing path."""
    module = SFTModule(str(model_dir("gpt2")), lora=None, optimizer=sgd)
    plain = copy.deepcopy(module.model).train()
    examples = answers(4)
    trainer(tmp_path, max_steps=1).fit(module, loader(examples, 2))
    plain_cross_entropy_steps(plain, [examples[:2]])
    expected = dict(plain.named_parameters())
    assert all(p.requires_grad for p in module.model.parameters())
    for name, parameter in module.model.named_parameters():
        torch.testing.assert_close(parameter, expected[name], atol=1e-6, rtol=1e-4)


def test_lora_plus_moves_b_faster(model_dir: Callable[[str], Path], tmp_path: Path) -> None:
    """With SGD and ratio 8, B moves eight times as far as with ratio 1; A as far (not at all)."""
    moves = []
    for ratio in (1.0, 8.0):
        torch.manual_seed(0)
        module = SFTModule(
            str(model_dir("gpt2")),
            optimizer=sgd,
            schedule="constant_with_warmup",
            lora_plus_ratio=ratio,
        )
        trainer(tmp_path, max_steps=1).fit(module, loader(answers(4), 4))
        moves.append({n: p for n, p in module.model.named_parameters() if "lora_B" in n})
    for name, moved in moves[0].items():
        torch.testing.assert_close(moves[1][name], 8 * moved)
    alone = SFTModule(
        str(model_dir("gpt2")),
        lora={"targets": ["wte"], "untie": True},
        optimizer=sgd,
        lora_plus_ratio=8.0,
    )
    with pytest.raises(AlignkitError, match=r"lora_plus_ratio=8\.0: there is no B of an adapter"):
        trainer(tmp_path, max_steps=1).fit(alone, loader(answers(4), 4))
