"""Train for a few steps, as the notebooks do."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from alignkit.callbacks import Checkpoint


def short_run(
    runs: Path, steps: int, module: LightningModule, data: LightningDataModule, name: str
) -> str:
    """Train on the CPU with two validations, and return the run's folder.

    Args:
        runs: The folder of all runs.
        steps: Optimizer steps.
        module: What is trained.
        data: What it is trained on.
        name: The run's, a folder in ``runs``.
    """
    logger = TensorBoardLogger(runs, name=name)
    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps,
        val_check_interval=max(steps // 2, 1),
        check_val_every_n_epoch=None,
        limit_val_batches=2,
        log_every_n_steps=1,
        gradient_clip_val=1.0,
        logger=logger,
        callbacks=[Checkpoint(filename="best", monitor="val/loss", save_last=True)],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data)
    return logger.log_dir
