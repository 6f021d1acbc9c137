"""A progress bar that fits in a terminal."""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar

_SHORT = {"train/loss": "loss", "val/loss": "val", "train/tokens_per_second": "tok/s"}


class ProgressBar(RichProgressBar):
    """Lightning's Rich bar with the three numbers worth watching, under short names."""

    def get_metrics(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """Return ``loss``, ``val`` (loss) and ``tok/s``, in few digits."""
        shown: dict[str, int | str | float | dict[str, float]] = {}
        for name, value in super().get_metrics(trainer, pl_module).items():
            if name in _SHORT and isinstance(value, float):
                shown[_SHORT[name]] = f"{value:,.0f}" if _SHORT[name] == "tok/s" else f"{value:.3f}"
        return shown
