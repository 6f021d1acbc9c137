"""Take optimizer steps whose loss is an exact mean, for any objective.

The optimised loss is ``Σ loss_sum / Σ weight`` over every micro-batch of the accumulation window
and every rank. A step that is not finite stops the run or is skipped, and a checkpoint written
within a window holds the state of the last step.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from alignkit.engine import PackedBatch
from alignkit.modules.hook import HasLoss
from alignkit.modules.metrics import EpochMetrics, EpochSums
from alignkit.modules.nonfinite import OnNonFinite, StepGuard
from alignkit.modules.position import Position
from alignkit.modules.precision import unscale_gradients
from alignkit.modules.sharding import (
    average_whole_gradients,
    gather_weights,
    gradient_norm,
    local_gradients,
    release_weights,
)
from alignkit.modules.tuning import mean_with_gradient_of_sum
from alignkit.modules.window import LossOutput, Window, scale_gradients

log = logging.getLogger(__name__)


class ExactSteps(HasLoss):
    """Run training, validation and test steps over `compute_loss`, and log their means.

    Args:
        on_nonfinite: See `StepGuard`.
    """

    perplexity = False
    """Whether the loss is a cross-entropy whose exponential is worth logging."""

    _norm: Tensor
    _taken: LossOutput | None = None

    def __init__(self, on_nonfinite: OnNonFinite = "stop") -> None:
        super().__init__()
        self.train_metrics = EpochMetrics(self.perplexity)
        self.val_metrics = EpochMetrics(self.perplexity)
        self.window = Window()
        self.epoch_sums = EpochSums()
        self.position = Position()
        self.guard = StepGuard(on_nonfinite)
        self._epoch_state: Mapping[str, Tensor] = {}

    # Batches --------------------------------------------------------------------------------

    def on_train_batch_start(self, batch: PackedBatch, batch_idx: int) -> None:
        """Clear the sums at the start of an epoch and of a window."""
        if batch_idx == 0:  # a run resumed between epochs has no `on_train_epoch_start`
            self.epoch_sums.clear()
        if self.position.before_batch(batch_idx, self.trainer, self.device):
            self.window.clear()

    def training_step(self, batch: PackedBatch, batch_idx: int) -> Tensor:
        """Return the batch's mean loss with the gradient of its *sum*.

        `on_before_optimizer_step` makes the window's mean exact.
        """
        output = self.compute_loss(batch)
        self.window.add(output, batch, batch_idx)
        return mean_with_gradient_of_sum(output.loss_sum, output.weight)

    def validation_step(self, batch: PackedBatch, batch_idx: int) -> None:
        """Add the batch to the epoch's means, which are reduced over ranks once an epoch."""
        self.val_metrics.update(self.compute_loss(batch))

    def test_step(self, batch: PackedBatch, batch_idx: int) -> None:
        """Add the batch to the epoch's means."""
        self.validation_step(batch, batch_idx)

    # Optimizer steps ------------------------------------------------------------------------

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Scale the accumulated gradients to that of the window's exact mean, and log the step.

        A step that is not finite stops the run or is skipped, by dropping its gradients.
        """
        unscale_gradients(self.trainer, optimizer)
        totals = self.window.close(self._sum_over_ranks)
        # Undo Lightning's division by the number of micro-batches and DDP's by that of ranks.
        constant = self.trainer.accumulate_grad_batches * self.trainer.world_size
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        average_whole_gradients(parameters)
        scale_gradients(parameters, constant / totals.weight)
        self._norm = gradient_norm(parameters)
        scales = getattr(self.trainer.precision_plugin, "scaler", None) is not None
        admitted = self.guard.admits(self, totals, None if scales else self._norm)
        self._log("train/lr", optimizer.param_groups[0]["lr"])
        if self.guard.skipped:
            self._log("train/skipped_steps", float(self.guard.skipped))
        self._taken = totals.own if admitted else None
        if not admitted:
            return
        for name, mean in self.logged_means(totals.means).items():
            self._log(f"train/{name}", mean, prog_bar=name == "loss")
        self._log("train/grad_norm", self._norm)
        self._log("train/tokens_per_second", totals.tokens_per_second, prog_bar=True)

    def logged_means(self, means: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return what is logged of a step's means; a subclass may log quotients of them."""
        return means

    def logged_totals(self, totals: LossOutput) -> LossOutput:
        """Return what is logged of an epoch, as sums; a subclass may leave metrics out."""
        return totals

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the gradient.

        Under mixed precision Lightning refuses to clip for a fused optimizer, which unscales
        inside its step; here gradients are unscaled by now.
        """
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if gradient_clip_val and gradient_clip_algorithm == "value":
            for gradient in local_gradients(parameters):
                gradient.clamp_(-gradient_clip_val, gradient_clip_val)
        elif gradient_clip_val:  # as `nn.utils.clip_grad_norm_`, which computes the norm again
            scale_gradients(parameters, (gradient_clip_val / (self._norm + 1e-6)).clamp(max=1.0))

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Take the step, and then count the window as done."""
        super().optimizer_step(*args, **kwargs)
        self.position.after_step()
        if self._taken is not None:
            self.epoch_sums.add(self._taken)

    def on_train_epoch_end(self) -> None:
        """Log the means over the epoch's optimizer steps as ``train/…_epoch``."""
        total = self.epoch_sums.total()
        if total is None:
            return
        self.train_metrics.update(self.logged_totals(total))
        for name, metric in self.train_metrics.named().items():
            attribute = f"train_metrics.means.{name}"
            self.log(f"train/{name}_epoch", metric, metric_attribute=attribute)

    def on_validation_epoch_start(self) -> None:
        """Begin the validation means."""
        self.val_metrics.reset()
        gather_weights(self)

    def on_test_epoch_start(self) -> None:
        """Begin the test means."""
        self.val_metrics.reset()
        gather_weights(self)

    def on_validation_epoch_end(self) -> None:
        """Log the validation means as ``val/…``."""
        release_weights(self)
        self._log_evaluation("val")
        self.position.after_validation(self.trainer)

    def on_test_epoch_end(self) -> None:
        """Log the test means as ``test/…``."""
        release_weights(self)
        self._log_evaluation("test")

    def on_train_epoch_start(self) -> None:
        """Restart the clock of the throughput, which excludes set-up."""
        self.window.restart_clock()

    def on_validation_end(self) -> None:
        """Exclude validation from the throughput, and warn if its loss is not finite."""
        self.window.restart_clock()
        loss = self.trainer.callback_metrics.get("val/loss")
        if loss is not None and not loss.isfinite() and self.trainer.is_global_zero:
            log.warning("global step %d: val/loss is %s", self.global_step, loss.item())

    @property
    def is_logged_step(self) -> bool:
        """Tell whether the trainer logs the step that was taken last."""
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        return self.global_step % max(every, 1) == 0

    # Checkpoints ----------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store the epoch's sums and the position of the last optimizer step."""
        checkpoint["epoch_sums"] = self.epoch_sums.state(self._sum_over_ranks)
        checkpoint["skipped_steps"] = self.guard.skipped
        self.position.save(checkpoint, self.trainer, self.device)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the position, the epoch's sums and the number of skipped steps."""
        self.position.load(checkpoint)
        self.guard.skipped = checkpoint.get("skipped_steps", 0)
        self._epoch_state = checkpoint.get("epoch_sums", {})

    def on_train_start(self) -> None:
        """Begin outside of any window, with the sums and the random state of a checkpoint.

        They are restored here because the sanity check before has drawn random numbers.
        """
        self.window.clear()
        self.epoch_sums.load(self._epoch_state, self.device, self.global_rank)
        self._epoch_state = {}
        self.position.start_run(self.trainer, self.device)

    # Inside ---------------------------------------------------------------------------------

    def _sum_over_ranks(self, values: Tensor) -> Tensor:
        summed: Tensor = self.trainer.strategy.reduce(values, reduce_op="sum")
        return summed

    def _log(self, name: str, value: float | Tensor, prog_bar: bool = False) -> None:
        # Totals are already summed over ranks; batch_size keeps Lightning from guessing one.
        self.log(name, value, prog_bar=prog_bar, batch_size=1, rank_zero_only=True)

    def _log_evaluation(self, stage: str) -> None:
        for name, metric in self.val_metrics.named().items():
            attribute = f"val_metrics.means.{name}"
            self.log(f"{stage}/{name}", metric, prog_bar=name == "loss", metric_attribute=attribute)
