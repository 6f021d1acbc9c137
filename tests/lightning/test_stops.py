"""A run that something stops leaves a file from which it goes on to the bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import (
    EarlyStopping,
    ModelCheckpoint,
    OnExceptionCheckpoint,
    SpikeDetection,
    Timer,
)

from alignkit.callbacks import Checkpoint
from alignkit.models.checkpoint import load_policy
from tests.lightning.helpers import Run, same

pytestmark = [
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:.*was called without a model"),
    pytest.mark.filterwarnings("ignore:.*there is no last checkpoint available"),
]


def test_a_timer_stops_and_saves(run: Callable[..., Run], plain: Run, workplace: Path) -> None:
    timer = Timer("00:01:00:00")
    keeper = Checkpoint(dirpath=workplace, save_last=True, monitor="val/loss")
    stopped = run(callbacks=[timer, keeper], enable_checkpointing=True)
    timer.time_elapsed = (  # type: ignore[method-assign]
        lambda stage=None: 3600.0 if len(stopped.losses) >= 3 else 0.0
    )
    stopped.fit()
    assert stopped.losses == plain.losses[:3]
    load_policy(str(workplace / "last.ckpt"))
    resumed = run(callbacks=[Timer("00:02:00:00")]).fit(workplace / "last.ckpt")
    assert resumed.losses == plain.losses[3:]
    assert same(resumed.weights, plain.weights)


def test_early_stopping_counts_on(run: Callable[..., Run], workplace: Path) -> None:
    """A resumed run has the patience that was left."""

    def make(epochs: int, name: str) -> Run:
        keeper = Checkpoint(dirpath=workplace / name, save_last=True, monitor="val/loss")
        stop = EarlyStopping("val/loss", min_delta=9.0, patience=3)
        return run(
            callbacks=[stop, keeper], enable_checkpointing=True, max_epochs=epochs,
            module={"schedule": "constant_with_warmup"},
        )  # fmt: skip

    whole = make(9, "whole").fit()
    assert len(whole.losses) == 3 * 4  # the first is an improvement on nothing
    make(2, "half").fit()
    resumed = make(9, "resumed").fit(workplace / "half/last.ckpt")
    assert resumed.losses == whole.losses[6:]


@pytest.mark.parametrize("by", ["OnExceptionCheckpoint", "save_on_exception"])
@pytest.mark.parametrize("step", [2, 3])
def test_an_exception_loses_no_batch(
    run: Callable[..., Run], plain: Run, workplace: Path, by: str, step: int
) -> None:
    """The batch whose step failed is the next one of the run that goes on."""
    keeper: Any = (
        OnExceptionCheckpoint(workplace, filename="fell")
        if by == "OnExceptionCheckpoint"
        else ModelCheckpoint(workplace, filename="fell", save_on_exception=True, save_top_k=0)
    )
    fell = run(callbacks=[keeper], enable_checkpointing=True)
    original = fell.module.training_step

    def training_step(batch: Any, batch_idx: int) -> Any:
        if len(fell.losses) == step:
            raise RuntimeError("the machine is on fire")
        return original(batch, batch_idx)

    fell.module.training_step = training_step  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="on fire"):
        fell.fit()
    load_policy(str(workplace / "fell.ckpt"))
    resumed = run().fit(workplace / "fell.ckpt")
    assert fell.losses + resumed.losses == plain.losses
    assert same(resumed.weights, plain.weights)


def test_spike_detection_is_restored(run: Callable[..., Run], plain: Run, workplace: Path) -> None:
    """Lightning restores it under a name that it does not have."""
    keeper = ModelCheckpoint(workplace, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    run(callbacks=[SpikeDetection(exclude_batches_path=workplace), keeper],
        enable_checkpointing=True).fit()  # fmt: skip
    spikes = SpikeDetection()
    resumed = run(callbacks=[spikes]).fit(workplace / "step=4.ckpt")
    assert resumed.losses == plain.losses[4:]
    assert spikes.last_val == pytest.approx(plain.losses[-1])
