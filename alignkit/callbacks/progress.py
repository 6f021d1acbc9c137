"""Show the training metrics that fit beside a progress bar."""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar

_SHORT = {"train/loss": "loss", "val/loss": "val", "train/tokens_per_second": "tok/s"}


class ProgressBar(RichProgressBar):
    """Show Lightning's Rich progress bar with three metrics under short names."""

    def get_metrics(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """Return the metrics to show: ``loss``, ``val`` (validation loss) and ``tok/s``."""
        shown: dict[str, int | str | float | dict[str, float]] = {}
        for name, value in super().get_metrics(trainer, pl_module).items():
            if name in _SHORT and isinstance(value, float):
                shown[_SHORT[name]] = f"{value:,.0f}" if _SHORT[name] == "tok/s" else f"{value:.3f}"
        return shown
