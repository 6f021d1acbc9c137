"""A run that is stopped anywhere and resumed sees the batches it would have seen."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import Callback

from alignkit.data import HHPreferenceDataModule
from alignkit.engine import PackedBatch

pytestmark = [
    # Lightning 2.6 uses what torch 2.13 deprecates.
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    # Its advice on the number of workers and the logging interval.
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
]


class Recorder(lightning.LightningModule):
    """Trains nothing and remembers the ids of every batch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[tuple[int, tuple[int, ...]]] = []

    def training_step(self, batch: PackedBatch, batch_idx: int) -> torch.Tensor:
        self.seen.append((self.current_epoch, tuple(batch.input_ids.tolist())))
        return self.weight * 0.0

    def validation_step(self, batch: PackedBatch, batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class SaveAndStop(Callback):
    """Saves after a number of micro-batches, at the hook where users save, and stops there."""

    def __init__(self, after: int, path: Path, hook: str) -> None:
        self.after, self.path, self.saved = after, path, False

        def save(trainer: lightning.Trainer, module: Recorder, *_: Any) -> None:
            if len(module.seen) >= after and not self.saved:
                self.saved = True
                trainer.save_checkpoint(path)
                raise KeyboardInterrupt

        setattr(self, hook, save)


def quiet(**options: Any) -> lightning.Trainer:
    return lightning.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        **options,
    )


def run(
    data: HHPreferenceDataModule, *callbacks: Callback, resume: Path | None = None, **options: Any
) -> list[tuple[int, tuple[int, ...]]]:
    module = Recorder()
    trainer = quiet(max_epochs=3, accumulate_grad_batches=2, callbacks=list(callbacks), **options)
    with contextlib.suppress(SystemExit):  # how Lightning ends after an interrupt
        trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=True)
    return module.seen


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("hook", "options"),
    [
        ("on_train_batch_end", {}),
        ("on_train_batch_end", {"val_check_interval": 2}),
        ("on_validation_end", {"val_check_interval": 2}),
        ("on_train_epoch_end", {}),
    ],
)
def test_resumes_at_the_next_batch(
    hh_dir: Path,
    make: Callable[..., Any],
    tmp_path: Path,
    hook: str,
    options: dict[str, Any],
    workers: int,
) -> None:
    def data(**more: Any) -> HHPreferenceDataModule:
        return make(HHPreferenceDataModule, hh_dir, tokens_per_batch=900, num_workers=workers)

    whole = run(data(), **options)
    per_epoch = len(whole) // 3
    assert per_epoch >= 5
    assert len(set(whole)) == len(whole)
    everywhere = hook == "on_train_batch_end" and not options and not workers
    for after in range(1, len(whole)) if everywhere else (2, per_epoch, per_epoch + 1):
        path = tmp_path / f"{after}.ckpt"
        before = run(data(), SaveAndStop(after, path, hook), **options)
        resumed = run(data(), resume=path, **options)
        assert before + resumed == whole, f"after {after} of {len(whole)}"
