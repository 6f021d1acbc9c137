"""The one method that makes a training objective."""

from __future__ import annotations

from lightning.pytorch import LightningModule

from alignkit.batch import PackedBatch
from alignkit.modules.window import LossOutput


class HasLoss(LightningModule):
    """A module that says what its loss over a batch is."""

    def compute_loss(self, batch: PackedBatch) -> LossOutput:
        """Return the batch's summed loss, its weight and its summed metrics: for a subclass to say.

        Args:
            batch: On the module's device; ``self.training`` tells training from validation.
        """
        raise TypeError(f"{type(self).__name__} must override compute_loss(batch) -> LossOutput")
