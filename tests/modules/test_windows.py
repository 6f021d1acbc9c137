"""A run saved anywhere, inside an accumulation window too, resumes as if it had never stopped."""

from __future__ import annotations

import contextlib
import json
import logging
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, OnExceptionCheckpoint

from alignkit import HHPreferenceDataModule, HHSFTDataModule, OpenWebTextDataModule
from alignkit.callbacks import Checkpoint
from alignkit.lora import LoRAConfig
from alignkit.modules import DPOModule, LoRAModule, SFTModule
from tests.modules.helpers import trainer

PER_EPOCH = 5


@pytest.fixture(scope="session")
def hh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs of very different lengths."""
    draw = random.Random(0)
    home = tmp_path_factory.mktemp("hh")

    def words() -> str:
        return " ".join(draw.choices(["bread", "tea", "salt", "rain"], k=draw.randint(1, 12)))

    for split, count in (("train", 60), ("test", 3)):
        rows = []
        for i in range(count):
            prompt = f"\n\nHuman: {i} {words()}?\n\nAssistant:"
            rows.append({"chosen": f"{prompt} {words()}!", "rejected": f"{prompt} {words()}."})
        (home / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return home


@pytest.fixture
def stage(
    hh: Path, model_dir: Callable[..., Path], tmp_path: Path
) -> Callable[..., tuple[L.LightningModule, L.LightningDataModule]]:
    """``stage(kind)``: a fresh module with adapter dropout, and its data."""

    def make(kind: type = SFTModule, workers: int = 0) -> Any:
        base = str(model_dir("gpt2"))
        torch.manual_seed(3)
        module = kind(base, lora=LoRAConfig(dropout=0.2))
        data_kind = HHPreferenceDataModule if kind is DPOModule else HHSFTDataModule
        data = data_kind(
            base,
            str(hh),
            tokens_per_batch=250,
            cache_dir=str(tmp_path / "cache"),
            num_workers=workers,
        )
        return module, data

    return make


class Recorder(L.pytorch.loggers.logger.DummyLogger):  # type: ignore[name-defined,misc]
    """Keeps what is logged, by step."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: dict[tuple[str, int], float] = {}

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        for name, value in metrics.items():
            measured = "tokens_per" in name or "peak_memory" in name  # another in every run
            if name.startswith(("train/", "val/")) and not measured:
                self.rows[name, int(step or 0)] = float(value)


def fit(
    pair: tuple[L.LightningModule, L.LightningDataModule],
    directory: Path,
    *callbacks: L.Callback,
    resume: Path | None = None,
    **options: Any,
) -> tuple[dict[str, torch.Tensor], dict[tuple[str, int], float]]:
    """Train; returns everything that training changed, flat, and what was logged."""
    module, data = pair
    if resume is not None:
        torch.manual_seed(99)  # what follows must come from the checkpoint
    logger = Recorder()
    settings = {"max_epochs": 2, "limit_train_batches": PER_EPOCH, **options}
    settings["enable_checkpointing"] = any(
        isinstance(each, L.pytorch.callbacks.Checkpoint) for each in callbacks
    )
    run = trainer(directory, logger=logger, callbacks=list(callbacks), **settings)
    with contextlib.suppress(Stop):
        run.fit(module, datamodule=data, ckpt_path=resume, weights_only=True)
    moments = run.optimizers[0].state_dict()["state"] if run.optimizers else {}
    state = {f"{n} {k}": v for n, own in moments.items() for k, v in own.items()}
    return {**module.state_dict(), **state}, logger.rows


class Stop(Exception):
    """Ends a run as an error would."""


class SaveEverywhere(L.Callback):
    """Writes a checkpoint at every hook of every micro-batch where users write them."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.seen = 0

    def _save(self, trainer: L.Trainer, hook: str) -> None:
        if not trainer.sanity_checking:
            trainer.save_checkpoint(self.home / f"{self.seen:02d}-{hook}.ckpt")

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.seen += 1
        self._save(trainer, "batch")

    def on_validation_end(self, trainer: L.Trainer, *_: Any) -> None:
        self._save(trainer, "validation")


def assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    wrong = [name for name in expected if not torch.equal(actual[name], expected[name])]
    assert not wrong, wrong


@pytest.mark.parametrize(
    ("kind", "accumulate", "every", "hook"),
    [
        (SFTModule, 2, 1, "validation"),
        (SFTModule, 3, 1, "batch"),
        (SFTModule, 4, 3, "*"),
        (DPOModule, 3, 1, "validation"),
        (DPOModule, 1, 2, "*"),
    ],
)
def test_resumes_bit_exactly_from_every_micro_batch(
    stage: Callable[..., Any], tmp_path: Path, kind: type, accumulate: int, every: int, hook: str
) -> None:
    """Five micro-batches an epoch: windows of 2, 3 or 4, the last of each epoch shorter."""
    options = {"accumulate_grad_batches": accumulate, "val_check_interval": every}
    whole, logged = fit(stage(kind), tmp_path, SaveEverywhere(tmp_path / "all"), **options)
    files = sorted((tmp_path / "all").glob(f"*-{hook}.ckpt"))
    assert len(files) >= 2 * PER_EPOCH
    for file in files:
        resumed, again = fit(stage(kind), tmp_path, resume=file, **options)
        assert_same(resumed, whole)
        assert {key: logged[key] for key in again} == again, file.name
        # Every step that follows is logged, and at the whole run's step.
        steps = {key for key in logged if key[0] == "train/loss"}
        done = torch.load(file, weights_only=True)["global_step"]
        assert {key for key in steps if key[1] >= done} <= again.keys(), file.name


class StopAt(L.Callback):
    """Asks the trainer to stop after a micro-batch, as a timer does."""

    def __init__(self, after: int) -> None:
        self.left = after

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.left -= 1
        trainer.should_stop = self.left <= 0


class FailIn(L.Callback):
    """Raises once a micro-batch's gradient is there, before the optimizer could step."""

    def __init__(self, number: int) -> None:
        self.left = number

    def on_after_backward(self, *_: Any) -> None:
        self.left -= 1
        if self.left == 0:
            raise Stop


@pytest.mark.parametrize(("workers", "places"), [(0, range(1, 2 * PER_EPOCH)), (1, (2, 5, 8))])
def test_a_run_that_was_stopped_goes_on_where_it_was(
    stage: Callable[..., Any], tmp_path: Path, workers: int, places: Iterable[int]
) -> None:
    """Lightning counts the epoch that a timer cuts as finished; what is left of it still comes."""
    options = {"accumulate_grad_batches": 3}
    whole, logged = fit(stage(), tmp_path, **options)
    for after in places:
        home = tmp_path / str(after)
        keep = Checkpoint(dirpath=home, save_last=True, enable_version_counter=False)
        fit(stage(workers=workers), tmp_path, StopAt(after), keep, **options)
        resumed, again = fit(stage(workers=workers), tmp_path, resume=home / "last.ckpt", **options)
        assert_same(resumed, whole)
        assert {key: logged[key] for key in again} == again


@pytest.mark.filterwarnings("ignore:.*was called without a model")
@pytest.mark.filterwarnings("ignore:.*there is no last checkpoint available")
def test_an_error_inside_a_window_loses_none_of_it(
    stage: Callable[..., Any], tmp_path: Path
) -> None:
    """Also in its last micro-batch, with the step still to come."""
    options = {"accumulate_grad_batches": 3}
    whole, logged = fit(stage(), tmp_path, **options)
    for number in range(1, 2 * PER_EPOCH):
        keep = OnExceptionCheckpoint(tmp_path / str(number), "broken")
        fit(stage(), tmp_path, FailIn(number), keep, **options)
        file = tmp_path / str(number) / "broken.ckpt"
        resumed, again = fit(stage(), tmp_path, resume=file, **options)
        assert_same(resumed, whole)
        assert {key: logged[key] for key in again} == again


class FailInValidation(L.Callback):
    """Raises in the middle of a validation."""

    def __init__(self, after: int) -> None:
        self.after = after

    def on_validation_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.fit_loop.total_batch_idx + 1 == self.after and not trainer.sanity_checking:
            raise Stop


@pytest.mark.filterwarnings("ignore:.*was called without a model")
@pytest.mark.filterwarnings("ignore:.*there is no last checkpoint available")
@pytest.mark.parametrize("after", [2, 3, 5])
def test_a_validation_that_broke_off_runs_again_whole(
    stage: Callable[..., Any], tmp_path: Path, after: int
) -> None:
    """Inside a window, at its end and at the epoch's; half a validation would be another mean."""
    options = {"accumulate_grad_batches": 3, "val_check_interval": 1}
    whole, logged = fit(stage(), tmp_path, **options)
    keep = OnExceptionCheckpoint(tmp_path / "run", "broken")
    _, before = fit(stage(), tmp_path, FailInValidation(after), keep, **options)
    file = tmp_path / "run" / "broken.ckpt"
    resumed, again = fit(stage(), tmp_path, resume=file, **options)
    assert_same(resumed, whole)
    assert {**before, **again} == logged


@pytest.mark.parametrize(
    ("workers", "limits"),
    [
        (0, ("max_steps", 2, 4)),
        (0, ("max_steps", 3, 5)),
        (1, ("max_steps", 3, 5)),
        (1, ("max_epochs", 1, 2)),
    ],
)
def test_a_longer_run_continues_a_finished_one(
    stage: Callable[..., Any], tmp_path: Path, workers: int, limits: tuple[str, int, int]
) -> None:
    """The schedule is constant: a run of 4 steps is one of 2 and 2 more, and sees the same data."""

    def constant() -> Any:
        module, data = stage(workers=workers)
        module.schedule = "constant_with_warmup"
        return module, data

    limit, short, long = limits
    options = {"accumulate_grad_batches": 3, "max_epochs": 4}
    whole, logged = fit(constant(), tmp_path, **{**options, limit: long})
    keep = Checkpoint(dirpath=tmp_path / "run", save_last=True, enable_version_counter=False)
    fit(constant(), tmp_path, keep, **{**options, limit: short})
    last = tmp_path / "run" / "last.ckpt"
    resumed, again = fit(constant(), tmp_path, resume=last, **{**options, limit: long})
    assert_same(resumed, whole)
    assert {key: logged[key] for key in again} == again


def test_a_stream_resumes_at_its_window(model_dir: Callable[..., Path], tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text(
        "\n".join(json.dumps({"text": "bread tea salt " * (1 + i % 7)}) for i in range(60))
    )

    def make() -> Any:
        base = str(model_dir("gpt2"))
        torch.manual_seed(3)
        data = OpenWebTextDataModule(
            base, str(text), streaming=True, held_out=5, block_size=32, tokens_per_batch=64,
            cache_dir=str(tmp_path / "cache"),
        )  # fmt: skip
        return LoRAModule(base, lora=LoRAConfig(dropout=0.2)), data

    options: dict[str, Any] = {
        "max_epochs": -1, "max_steps": 4, "accumulate_grad_batches": 3, "limit_train_batches": 1.0,
    }  # fmt: skip
    whole, _ = fit(make(), tmp_path, SaveEverywhere(tmp_path / "all"), **options)
    files = sorted((tmp_path / "all").iterdir())
    assert len(files) == 12
    for file in files:
        assert_same(fit(make(), tmp_path, resume=file, **options)[0], whole)


def test_a_validation_is_counted_once(stage: Callable[..., Any], tmp_path: Path) -> None:
    """Run again after a resume, early stopping would take its value for one without progress."""
    options = {"accumulate_grad_batches": 3, "val_check_interval": 2}
    stopping = EarlyStopping("val/loss", patience=100)
    keep = SaveEverywhere(tmp_path / "all")
    whole = EarlyStopping("val/loss", patience=100, mode="max")
    fit(stage(), tmp_path, whole, keep, **options)
    for name in ("02-validation", "03-batch", "07-validation"):
        stopping = EarlyStopping("val/loss", patience=100, mode="max")
        fit(stage(), tmp_path, stopping, resume=tmp_path / "all" / f"{name}.ckpt", **options)
        assert stopping.state_dict() == whole.state_dict(), name


def test_a_second_fit_begins_with_an_empty_window(
    stage: Callable[..., Any], tmp_path: Path
) -> None:
    """What a stopped run left of a window is no part of the next run's first step."""
    options = {"accumulate_grad_batches": 3, "max_epochs": 1}
    module, data = stage()
    start = {name: value.clone() for name, value in module.state_dict().items()}
    fit((module, data), tmp_path, StopAt(2), **options)
    assert all(torch.equal(value, start[name]) for name, value in module.state_dict().items())
    torch.manual_seed(5)
    again, _ = fit((module, data), tmp_path, **options)
    fresh = stage()
    torch.manual_seed(5)
    expected, _ = fit(fresh, tmp_path, **options)
    assert_same(again, expected)


def test_other_windows_are_taken_within_an_epoch_and_between_two(
    stage: Callable[..., Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Within one, what is left of its order is cut anew; see `tests/data/test_elastic.py`."""
    caplog.set_level(logging.INFO, "alignkit")
    fit(stage(), tmp_path, SaveEverywhere(tmp_path / "all"), accumulate_grad_batches=2)
    for name, within in (("01-batch", False), ("03-batch", True), ("05-batch", False)):
        caplog.clear()
        file = tmp_path / "all" / f"{name}.ckpt"
        assert fit(stage(), tmp_path, resume=file, accumulate_grad_batches=4)[0]
        assert ("4 micro-batch(es) a step instead of 2" in caplog.text) is within


def test_another_precision_is_taken(stage: Callable[..., Any], tmp_path: Path) -> None:
    fit(stage(), tmp_path, SaveEverywhere(tmp_path / "all"), max_epochs=1)
    file = tmp_path / "all" / "03-batch.ckpt"
    exact, _ = fit(stage(), tmp_path, resume=file, max_epochs=1)
    rounded, logged = fit(stage(), tmp_path, resume=file, max_epochs=1, precision="bf16-mixed")
    assert ("train/loss", 4) in logged
    assert any(not torch.equal(rounded[name], exact[name]) for name in exact)
