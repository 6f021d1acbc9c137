"""Callbacks and flags that watch: they see what happens, and nothing else changes by a bit."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import (
    DeviceStatsMonitor,
    EarlyStopping,
    LambdaCallback,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelSummary,
    OnExceptionCheckpoint,
    RichModelSummary,
    RichProgressBar,
    SpikeDetection,
    ThroughputMonitor,
    Timer,
    TQDMProgressBar,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.profilers import PyTorchProfiler

from alignkit.objectives.preference import DPO
from tests.lightning.helpers import Run, same

pytestmark = [
    # What Lightning and PyTorch themselves say of a short run, of FLOPs nobody counted, and of
    # flags that switch logging off.
    pytest.mark.filterwarnings("ignore:When using the `ThroughputMonitor`"),
    pytest.mark.filterwarnings("ignore:The PyTorch Profiler default schedule"),
    pytest.mark.filterwarnings("ignore:You are trying to `self.log"),
    pytest.mark.filterwarnings("ignore:You have turned on `Trainer"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

BARE = dict.fromkeys(
    ("enable_checkpointing", "logger", "enable_progress_bar", "enable_model_summary")
)
WATCHERS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "EarlyStopping": lambda d: {"callbacks": [EarlyStopping("val/loss")]},
    "LearningRateMonitor": lambda d: {"callbacks": [LearningRateMonitor()], "logger": CSVLogger(d)},
    "ThroughputMonitor": lambda d: {
        "callbacks": [ThroughputMonitor(lambda b: b.num_examples, lambda b: b.num_tokens)],
        "logger": CSVLogger(d),
    },
    "DeviceStatsMonitor": lambda d: {"callbacks": [DeviceStatsMonitor()], "logger": CSVLogger(d)},
    "Timer": lambda d: {"callbacks": [Timer("00:01:00:00")]},
    "TQDMProgressBar": lambda d: {"callbacks": [TQDMProgressBar()], "enable_progress_bar": True},
    "RichProgressBar": lambda d: {"callbacks": [RichProgressBar()], "enable_progress_bar": True},
    "ModelSummary": lambda d: {"callbacks": [ModelSummary(2)]},
    "RichModelSummary": lambda d: {"callbacks": [RichModelSummary(2)]},
    "LambdaCallback": lambda d: {"callbacks": [LambdaCallback(on_train_batch_end=print)]},
    "SpikeDetection": lambda d: {"callbacks": [SpikeDetection()]},
    "OnExceptionCheckpoint": lambda d: {
        "callbacks": [OnExceptionCheckpoint(d)],
        "enable_checkpointing": True,
    },
    "ModelCheckpoint": lambda d: {
        "callbacks": [ModelCheckpoint(d, monitor="val/loss", save_top_k=2)],
        "enable_checkpointing": True,
    },
    "profiler=simple": lambda d: {"profiler": "simple"},
    "profiler=advanced": lambda d: {"profiler": "advanced"},
    "profiler=pytorch": lambda d: {
        "profiler": PyTorchProfiler(d, "p", export_to_chrome=False, row_limit=5)
    },
    "detect_anomaly": lambda d: {"detect_anomaly": True},
    "inference_mode=False": lambda d: {"inference_mode": False},
    "barebones": lambda d: {"barebones": True, "log_every_n_steps": None, **BARE},
    "deterministic": lambda d: {"deterministic": True},
    "num_sanity_val_steps=-1": lambda d: {"num_sanity_val_steps": -1},
    "reload_dataloaders_every_n_epochs": lambda d: {"reload_dataloaders_every_n_epochs": 1},
}


@pytest.fixture(autouse=True)
def _deterministic() -> Any:
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.filterwarnings("ignore:.*was called without a model")
@pytest.mark.filterwarnings("ignore:.*but there is no last checkpoint available")
@pytest.mark.parametrize("name", WATCHERS)
def test_watching_changes_nothing(
    run: Callable[..., Run], plain: Run, workplace: Path, name: str
) -> None:
    """Neither a loss nor a weight."""
    watched = run(**WATCHERS[name](workplace)).fit()
    assert len(plain.losses) == 6
    assert watched.losses == plain.losses
    assert same(watched.weights, plain.weights)


def rows(directory: Path) -> list[dict[str, str]]:
    (path,) = directory.rglob("metrics.csv")
    with path.open() as lines:
        return list(csv.DictReader(lines))


def numbers(directory: Path, name: str) -> list[float]:
    return [float(row[name]) for row in rows(directory) if row.get(name)]


@pytest.mark.filterwarnings("ignore:Experiment logs directory")
def test_what_is_logged_is_true(run: Callable[..., Run], plain: Run, workplace: Path) -> None:
    """CSVLogger: losses as trained; LearningRateMonitor: rates as used."""
    watched = run(callbacks=[LearningRateMonitor()], logger=CSVLogger(workplace)).fit()
    assert numbers(workplace, "train/loss") == pytest.approx(plain.losses)
    rates = numbers(workplace, "lr-AdamW")
    assert rates == pytest.approx(numbers(workplace, "train/lr"))
    assert rates[0] == pytest.approx(1e-2)
    assert rates == sorted(rates, reverse=True)
    assert watched.trainer.callback_metrics["lr-AdamW"].item() == pytest.approx(rates[-1])


def test_throughput_counts_real_examples_and_tokens(
    run: Callable[..., Run], workplace: Path
) -> None:
    monitor = ThroughputMonitor(lambda b: b.num_examples, lambda b: b.num_tokens)
    watched = run(callbacks=[monitor], logger=CSVLogger(workplace)).fit()
    lengths = watched.data._set("train").lengths
    assert numbers(workplace, "train/samples")[-1] == 2 * len(lengths)
    assert monitor._lengths["train"] == 2 * int(lengths.sum())


def test_device_stats_are_logged(run: Callable[..., Run], workplace: Path) -> None:
    run(callbacks=[DeviceStatsMonitor()], logger=CSVLogger(workplace)).fit()
    names = {name for row in rows(workplace) for name in row if "DeviceStatsMonitor" in name}
    assert names


def test_the_summary_counts_what_trains(
    run: Callable[..., Run], capsys: pytest.CaptureFixture[str]
) -> None:
    watched = run(callbacks=[RichModelSummary(2)], max_epochs=1).fit()
    trained = sum(v.numel() for v in watched.weights.values())
    shown = capsys.readouterr().out
    assert f"{trained / 1000:.1f} K" in shown
    assert "reference" in shown


def test_watchers_see_the_mean_loss(run: Callable[..., Run], plain: Run) -> None:
    """A sum would grow with the batch, and a larger batch would look like a spike."""
    seen: list[float] = []
    keep = LambdaCallback(
        on_train_batch_end=lambda _, __, outputs, *___: seen.append(float(outputs["loss"]))
    )
    run(callbacks=[keep]).fit()
    assert seen == pytest.approx(plain.losses)


def test_a_spike_stops_the_run(run: Callable[..., Run]) -> None:
    watched = run(
        callbacks=[SpikeDetection(rtol=0.5, warmup=2)],
        module={"optimizer": lambda p: torch.optim.SGD(p, lr=3e2), "loss": DPO(beta=5.0)},
    )
    with pytest.raises(RuntimeError, match="Training spike detected in batch 2"):
        watched.fit()


def test_early_stopping_stops(run: Callable[..., Run]) -> None:
    """With a learning rate of next to nothing nothing improves by 0.1."""
    stop = EarlyStopping("val/loss", min_delta=0.1, patience=1)
    stopped = run(
        callbacks=[stop],
        max_epochs=9,
        module={"optimizer": lambda p: torch.optim.SGD(p, lr=1e-9)},
    ).fit()
    assert stopped.trainer.current_epoch == 2
    assert stop.best_score.item() == pytest.approx(stopped.losses[0], abs=1e-4)


def test_fast_dev_run_trains_and_keeps_nothing(run: Callable[..., Run], workplace: Path) -> None:
    quick = run(fast_dev_run=2, callbacks=[ModelCheckpoint(workplace / "kept")],
                enable_checkpointing=True).fit()  # fmt: skip
    assert len(quick.losses) == 2
    assert not list(workplace.rglob("*.ckpt"))


def test_fewer_batches_are_the_first_ones(run: Callable[..., Run], plain: Run) -> None:
    """limit_train_batches: the schedule, too, counts what is trained."""
    few = run(limit_train_batches=2, module={"schedule": "constant_with_warmup"}).fit()
    whole = run(module={"schedule": "constant_with_warmup"}).fit()
    assert few.losses[:2] == whole.losses[:2]
    assert len(few.losses) == 4
    linear = run(limit_train_batches=2, module={"schedule": "linear"}).fit()
    assert linear.trainer.optimizers[0].param_groups[0]["lr"] == 0.0


def test_overfitting_repeats_its_batches(run: Callable[..., Run]) -> None:
    seen: list[int] = []
    keep = LambdaCallback(
        on_train_batch_start=lambda _, __, batch, ___: seen.append(batch.input_ids.sum().item())
    )
    again = run(overfit_batches=2, callbacks=[keep], max_epochs=3).fit()
    assert seen == seen[:2] * 3
    assert again.losses[-1] < again.losses[0]


@pytest.mark.parametrize("interval", ["every_n_train_steps", "train_time_interval", "monitor"])
def test_stock_checkpoints_resume_to_the_bit(
    run: Callable[..., Run], plain: Run, workplace: Path, interval: str
) -> None:
    from datetime import timedelta

    chosen: dict[str, Any] = {
        "every_n_train_steps": {"every_n_train_steps": 2, "save_top_k": -1},
        "train_time_interval": {"train_time_interval": timedelta(0), "save_top_k": -1},
        "monitor": {"monitor": "val/loss", "save_top_k": 2, "mode": "min"},
    }[interval]

    def keeper() -> ModelCheckpoint:
        return ModelCheckpoint(workplace / "kept", filename="{step}", **chosen)

    run(callbacks=[keeper()], enable_checkpointing=True).fit()
    files = sorted((workplace / "kept").glob("*.ckpt"))
    steps = [int(file.stem.removeprefix("step=")) for file in files]
    expected = {
        "every_n_train_steps": [2, 4, 6], "train_time_interval": [1, 2, 3, 4, 5, 6],
        "monitor": [3, 6],
    }  # fmt: skip
    assert steps == expected[interval]
    for step, file in itertools.islice(zip(steps, files, strict=True), 3):
        resumed = run(callbacks=[keeper()], enable_checkpointing=True).fit(file)
        assert resumed.losses == plain.losses[step:]
        if step < 6:
            assert same(resumed.weights, plain.weights)
