"""What cannot be right is refused in one line, before anything is trained."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BaseFinetuning,
    Callback,
    DeviceStatsMonitor,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelPruning,
    OnExceptionCheckpoint,
    ThroughputMonitor,
)

from alignkit.callbacks import Checkpoint
from alignkit.errors import AlignkitError
from alignkit.models.checkpoint import load_policy, read_checkpoint
from alignkit.modules.companions import check_callbacks
from tests.lightning.helpers import Run


class Unfreeze(BaseFinetuning):
    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.model)


REFUSED: dict[str, tuple[Callable[[], Callback], str]] = {
    "accumulation": (lambda: GradientAccumulationScheduler({1: 2}), "trainer.accumulate_grad_batc"),
    "backbone": (BackboneFinetuning, "choose what trains with model.lora"),
    "finetuning": (Unfreeze, "choose what trains with model.lora"),
    "pruning": (lambda: ModelPruning("l1_unstructured"), "prune the base before training"),
    "rates": (LearningRateMonitor, "has no logger to write to"),
    "device": (DeviceStatsMonitor, "has no logger to write to"),
    "throughput": (lambda: ThroughputMonitor(len), "has no logger to write to"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(run: Callable[..., Run], name: str) -> None:
    make, reason = REFUSED[name]
    callback = make()
    refused = run(callbacks=[callback])
    with pytest.raises(AlignkitError) as caught:
        refused.fit()
    message = str(caught.value)
    assert message.startswith(f"{type(callback).__name__}: ")
    assert reason in message
    assert "\n" not in message
    assert not refused.losses


@pytest.mark.parametrize(
    ("callback", "named"),
    [
        (OnExceptionCheckpoint("."), "leave it out on several processes"),
        (ModelCheckpoint(save_on_exception=True), "leave save_on_exception out on several"),
        (Checkpoint(save_on_exception=True), "leave save_on_exception out on several"),
    ],
)
def test_a_rank_that_fails_does_not_wait_for_the_others(callback: Callback, named: str) -> None:
    """Saving takes all ranks, and they go on training: they would wait half an hour."""
    options: dict[str, Any] = {"accelerator": "cpu", "logger": False, "callbacks": [callback]}
    check_callbacks(Trainer(devices=1, **options), lora_plus=False)
    for more in ({"devices": 2}, {"devices": 1, "num_nodes": 2}):
        with pytest.raises(AlignkitError, match=f"^{type(callback).__name__}: .*{named}"):
            check_callbacks(Trainer(strategy="ddp", **more, **options), lora_plus=False)


@pytest.mark.parametrize("sanity", [2, 0])
@pytest.mark.parametrize("monitor", ["val_loss", "val/los", "val/perplexity"])
@pytest.mark.parametrize("kind", [EarlyStopping, ModelCheckpoint])
def test_a_wrong_monitor_is_known_at_the_sanity_check(
    run: Callable[..., Run], workplace: Path, kind: Any, monitor: str, sanity: int
) -> None:
    callback = kind(monitor=monitor)
    refused = run(
        callbacks=[callback],
        enable_checkpointing=kind is ModelCheckpoint,
        num_sanity_val_steps=sanity,
    )
    with pytest.raises(AlignkitError, match=rf"monitor '{monitor}' is no metric .*val/loss"):
        refused.fit()
    assert bool(refused.losses) is (sanity == 0)


def test_a_metric_of_training_may_be_monitored(run: Callable[..., Run], plain: Run) -> None:
    stop = EarlyStopping("train/loss_epoch", check_on_train_epoch_end=True)
    assert run(callbacks=[stop]).fit().losses == plain.losses


class Keeps(Callback):
    """A callback with something in its state."""

    def __init__(self, state: Any) -> None:
        self.state = state

    def state_dict(self) -> dict[str, Any]:
        return {"state": self.state}


def test_a_state_that_would_not_load_is_not_saved(run: Callable[..., Run], workplace: Path) -> None:
    """Paths become strings; any other object is named when the first file is written."""
    kept = run(callbacks=[Keeps({"paths": [workplace], "n": (1, 2.0, None)})], max_epochs=1).fit()
    kept.trainer.save_checkpoint(workplace / "kept.ckpt")
    states = read_checkpoint(workplace / "kept.ckpt")["callbacks"]
    assert states["Keeps"] == {"state": {"paths": [str(workplace)], "n": (1, 2.0, None)}}
    kept.trainer.callbacks = [Keeps(timedelta(1))]
    with pytest.raises(AlignkitError, match=r"^Keeps: keeps a timedelta in its state"):
        kept.trainer.save_checkpoint(workplace / "lost.ckpt")
    assert not (workplace / "lost.ckpt").exists()


def test_weights_alone_start_another_stage(run: Callable[..., Run], workplace: Path) -> None:
    keeper = ModelCheckpoint(workplace, filename="alone", save_weights_only=True)
    trained = run(callbacks=[keeper], enable_checkpointing=True, max_epochs=1).fit()
    policy, _ = load_policy(str(workplace / "alone.ckpt"))
    saved = read_checkpoint(workplace / "alone.ckpt")
    assert saved["state_dict"].keys() == trained.weights.keys()
    assert not any(p.requires_grad for p in policy.parameters())
