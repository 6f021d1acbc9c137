"""Show how far a run has come, in optimizer steps."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar as BaseProgressBar

from alignkit.modules.optimize import total_steps
from alignkit.utils.progress import Count, Display

_SHOWN: dict[str, Callable[[float], str]] = {
    "train/loss": "loss {:.3f}".format,
    "val/loss": "val {:.3f}".format,
    "train/tokens_per_second": "{:,.0f} tok/s".format,
}


class ProgressBar(BaseProgressBar):
    """Show ``step 16/32`` with the losses and the speed, and batches of a validation.

    On a terminal this is a bar that fits it, above which log lines scroll. Elsewhere it is a line
    for the first and the last step, each tenth of the run and every validation, and at least every
    ten seconds.
    """

    def __init__(self) -> None:
        super().__init__()
        self._enabled = True
        self._display: Display | None = None
        self._steps: Count | None = None
        self._batches: Count | None = None

    def disable(self) -> None:
        """Show nothing, which Lightning asks of every rank but the first."""
        self._enabled = False

    def enable(self) -> None:
        """Show it again."""
        self._enabled = True

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print above the bar, which `print` does by itself while a bar is shown."""
        if self._enabled:
            print(*args, **kwargs)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to count steps."""
        self._steps = self._begin("step", total_steps(trainer), tenths=True)
        if self._steps is not None and trainer.global_step:
            self._steps.reach(trainer.global_step)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Show the step that the batch ended, if it ended one."""
        ended = not trainer.fit_loop._should_accumulate()
        if self._steps is not None and ended:
            self._steps.reach(trainer.global_step, self._metrics(trainer, pl_module))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the display, which leaves the last step on the screen."""
        self._close()

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Show how many batches of a validation are done."""
        checks = trainer.sanity_checking
        totals = trainer.num_sanity_val_batches if checks else trainer.num_val_batches
        what = "sanity check" if checks else "validation"
        self._reach_batch(what, batch_idx, totals[dataloader_idx])

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the steps again, with the validation loss."""
        self._end_batches()
        if self._steps is not None and not trainer.sanity_checking:
            self._steps.reach(trainer.global_step, self._metrics(trainer, pl_module), now=True)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Show how many batches of a test are done."""
        self._reach_batch("test", batch_idx, trainer.num_test_batches[dataloader_idx])

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the count away."""
        self._end_batches()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Give the terminal back."""
        self._close()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the terminal back."""
        self._close()

    def _begin(self, what: str, total: float | None, tenths: bool = False) -> Count | None:
        if not self._enabled:
            return None
        if self._display is None:
            self._display = Display(sys.stdout)
        known = total is not None and total != float("inf")
        steps = int(total) if known and total is not None else None
        return self._display.count(what, steps, tenths=tenths)

    def _reach_batch(self, what: str, index: int, total: float) -> None:
        if self._batches is None:
            self._batches = self._begin(what, total)
        if self._batches is not None:
            self._batches.reach(index + 1)

    def _end_batches(self) -> None:
        if self._batches is not None:
            self._batches.end()
        self._batches = None

    def _close(self) -> None:
        if self._display is not None:
            self._display.close()
        self._display = self._steps = self._batches = None

    def _metrics(self, trainer: Trainer, pl_module: LightningModule) -> str:
        metrics = self.get_metrics(trainer, pl_module)
        found = ((show, metrics.get(name)) for name, show in _SHOWN.items())
        return "  ".join(show(value) for show, value in found if isinstance(value, float))
