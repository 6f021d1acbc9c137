"""Declare `compute_loss`, the method that a training objective overrides."""

from __future__ import annotations

from lightning.pytorch import LightningModule

from alignkit.batch import PackedBatch
from alignkit.modules.window import LossOutput


class HasLoss(LightningModule):
    """Declare a LightningModule with a loss over a packed batch."""

    def compute_loss(self, batch: PackedBatch) -> LossOutput:
        """Return the batch's summed loss, its weight and its summed metrics.

        Args:
            batch: The batch, on the module's device; ``self.training`` is false in validation.
        """
        raise TypeError(f"{type(self).__name__} must override compute_loss(batch) -> LossOutput")
