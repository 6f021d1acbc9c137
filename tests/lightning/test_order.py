"""Trainer methods in any order: what one leaves behind does not break the next."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from alignkit.engine import collate
from alignkit.errors import AlignkitError
from alignkit.lora import LoRAConfig
from alignkit.modules import DPOModule, SFTModule
from alignkit.modules.base import AlignmentModule
from tests.modules.helpers import answers, loader, pairs, trainer


def run(
    base: Path, stage: type[AlignmentModule], order: list[str], directory: Path, **options: Any
) -> tuple[AlignmentModule, list[dict[str, float]]]:
    """Call trainer methods one after the other, each on a trainer of its own."""
    torch.manual_seed(0)
    extra = {"reference_cache": str(directory / "cache")} if options.pop("cache", False) else {}
    module = stage(
        str(base),
        lora=LoRAConfig(targets="all-linear"),
        optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2),
        schedule="constant_with_warmup",
        **extra,
    )
    batches = loader(pairs(6) if stage is DPOModule else answers(6), 2)
    results = []
    for step in order:
        runner = trainer(directory, max_epochs=1, **options)
        if step == "fit":
            runner.fit(module, batches, batches)
        else:
            getattr(runner, step)(module, batches, verbose=False)
        results.append({k: float(v) for k, v in runner.callback_metrics.items()})
    return module, results


@pytest.mark.parametrize(
    ("order", "cache", "inference_mode"),
    [
        (["validate", "fit"], False, True),
        (["validate", "fit"], True, True),
        (["validate", "test", "validate", "fit"], False, False),
        (["fit", "test", "fit"], False, True),
        (["fit", "validate", "fit", "test"], True, True),
    ],
)
def test_dpo(
    model_dir: Callable[[str], Path],
    tmp_path: Path,
    order: list[str],
    cache: bool,
    inference_mode: bool,
) -> None:
    """What measures does not change what is learned, nor what the other measures."""
    base = model_dir("llama")
    _, results = run(base, DPOModule, order, tmp_path, cache=cache, inference_mode=inference_mode)
    fits = [step for step in order if step == "fit"]
    _, plain = run(base, DPOModule, fits, tmp_path / "plain", cache=cache)
    actual = [r for r, step in zip(results, order, strict=True) if step == "fit"]
    for one, other in zip(actual, plain, strict=True):
        for name in ("train/loss", "val/loss", "val/rewards/margins"):
            assert one[name] == pytest.approx(other[name], rel=1e-4, abs=1e-5), name
    first = results[0]
    if order[0] == "validate":
        assert first["val/loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert actual[-1]["val/loss"] < 0.68  # it goes on learning


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_the_same_row_layout_serves_measuring_and_training(
    model_dir: Callable[[str], Path], tmp_path: Path, precision: str
) -> None:
    """In bf16 a row's layout is made lazily, for a batch that training may meet next."""
    for stage in (SFTModule, DPOModule):
        _, results = run(
            model_dir("llama"), stage, ["validate", "fit", "test", "fit"], tmp_path,
            precision=precision,
        )  # fmt: skip
        # Of so few pairs not every gauge has a value.
        losses = [value for each in results for name, value in each.items() if "loss" in name]
        assert losses and all(map(math.isfinite, losses))


def test_predicting_is_refused(model_dir: Callable[[str], Path], tmp_path: Path) -> None:
    module = SFTModule(str(model_dir("gpt2")))
    with pytest.raises(AlignkitError, match=r"nothing to predict; .*alignkit generate"):
        trainer(tmp_path).predict(module, loader(answers(2), 2))


def test_a_trained_policy_may_train_on(model_dir: Callable[[str], Path], tmp_path: Path) -> None:
    """Only a policy that has never trained must start as its reference."""
    module, _ = run(model_dir("gpt2"), DPOModule, ["fit"], tmp_path)
    batch = collate(pairs(2))
    assert module.compute_loss(batch).loss_sum.item() / 2 != pytest.approx(math.log(2), abs=1e-3)
    trainer(tmp_path, max_steps=1).fit(module, loader(pairs(2), 2))
