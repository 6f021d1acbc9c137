"""Run a validation at the end of a run that ends within an epoch."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class FinalValidation(Callback):
    """Run a validation after the step ``max_steps``, wherever in its epoch it is.

    Lightning would end the run without: a short one would have no validation at all, and the best
    checkpoint could not be its last.
    """

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        """Ask for the end of training, before which Lightning validates."""
        if 0 <= trainer.max_steps <= trainer.global_step:
            trainer.should_stop = True
