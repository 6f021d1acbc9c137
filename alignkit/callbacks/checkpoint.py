"""A ``last.ckpt`` that is the last."""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint


class Checkpoint(ModelCheckpoint):
    """Lightning's ModelCheckpoint, with ``last.ckpt`` written at every validation and at the end.

    Lightning 2.6 rewrites it only where the monitored value improved, so that the next stage, or a
    resumed run, would silently start from an older step.
    """

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the best as Lightning does, then the last."""
        super().on_validation_end(trainer, pl_module)
        self._write_last(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the last step, whether or not a validation followed it."""
        super().on_train_end(trainer, pl_module)
        self._write_last(trainer)

    def _write_last(self, trainer: Trainer) -> None:
        if self.save_last and not self._should_skip_saving_checkpoint(trainer):
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
