"""Measure the pairs of a validation by gauges, and warn where chosen answers fall."""

from __future__ import annotations

import logging
from typing import Any, cast

import torch
from torch import Tensor, nn

from alignkit.modules.answers import reads_as_we_do, refuse_rows_with_other_counts
from alignkit.modules.base import AlignmentModule
from alignkit.modules.gauges import GAUGES, Gauge, RatedPairs
from alignkit.utils.exact import exact

_SURE = 2.0
"""How many standard errors a mean must lie from 0."""
_FEWEST = 4
"""Pairs below which a standard error says too little."""
log = logging.getLogger(__name__)


class WatchedModule(AlignmentModule):
    """Log the gauges of validations, of the pairs that a subclass hands to ``watch``.

    Attributes:
        loss: Compares two answers to a prompt, or more.
        watch: Takes batches of pairs.
    """

    loss: Any
    watch: PairWatch

    def setup(self, stage: str) -> None:
        """Refuse rows with other numbers of answers than the loss takes, before any step.

        A subclass with a `compute_loss` or `scores` of its own may take others.

        Raises:
            AlignkitError: There is one.
        """
        super().setup(stage)
        if reads_as_we_do(self):
            data = getattr(self.trainer, "datamodule", None)
            splits = {"fit": ["train", "validation"], "validate": ["validation"], "test": ["test"]}
            read = splits.get(stage, [])
            if stage == "fit" and not self.trainer.limit_val_batches:
                read.remove("validation")
            refuse_rows_with_other_counts(data, read, self.loss)

    def on_validation_epoch_start(self) -> None:
        """Begin the validation's gauges."""
        super().on_validation_epoch_start()
        self.watch.reset()

    def on_test_epoch_start(self) -> None:
        """Begin the test's gauges."""
        super().on_test_epoch_start()
        self.watch.reset()

    def on_train_batch_end(self, *args: Any) -> None:
        """Check whether chosen answers fall, after the steps that are logged."""
        super().on_train_batch_end(*args)
        falling = self.watch.falling
        if falling.compares and self.is_logged_step and not self.window.micro_batches:
            falling.check()

    def _log_evaluation(self, stage: str) -> None:
        super()._log_evaluation(stage)
        for name, gauge in self.watch.named().items():
            self.log(f"{stage}/{name}", gauge, metric_attribute=f"watch.gauges.{name}")
        if self.trainer.sanity_checking:  # its few batches are no validation
            self.watch.falling.reset()
        else:
            self.watch.falling.check()


class PairWatch(nn.Module):
    """Add pairs to the gauges of validations, and to `FallingChosen` in training as well.

    Args:
        compares: Whether the policy is compared with a reference.
        warns: Whether falling chosen answers are told of.

    Attributes:
        margins: Those of the validation's pairs on this rank, a tensor a batch.
    """

    def __init__(self, compares: bool, warns: bool = True) -> None:
        super().__init__()
        used = {name: kind for name, kind in GAUGES.items() if compares or not kind.compares}
        self.gauges = nn.ModuleDict({name: kind() for name, kind in used.items()})
        self.falling = FallingChosen(compares)
        self.falling.told = not warns
        self.margins: list[Tensor] = []

    def named(self) -> dict[str, Gauge]:
        """Return the gauges by the names that they are logged under."""
        return {name: cast(Gauge, gauge) for name, gauge in self.gauges.items()}

    def reset(self) -> None:
        """Begin a validation."""
        self.falling.reset()
        self.margins = []
        for gauge in self.named().values():
            gauge.reset()

    @torch.no_grad()
    def add(self, pairs: RatedPairs, training: bool) -> None:
        """Add a batch, which takes part in the gauges outside of training."""
        self.falling.add(pairs, training)
        if training:
            return
        self.margins.append(pairs.margin)
        for gauge in self.named().values():
            gauge.update(pairs)


class FallingChosen:
    """Warn once where the chosen answers become less likely while the margin grows.

    With a reference the batches since the last check are judged: their chosen answers are less
    likely than under the reference, and their margins above 0, both by two standard errors. Without
    one, each pair of a validation is compared with itself in the run's first, by the same rule.

    Args:
        compares: Whether there is a reference.
    """

    def __init__(self, compares: bool) -> None:
        self.compares = compares
        self.told = False
        self._batches: list[Tensor] = []
        self._first: Tensor | None = None

    def reset(self) -> None:
        """Forget the batches since the last check."""
        self._batches = []

    def add(self, pairs: RatedPairs, training: bool) -> None:
        """Add a batch, without waiting for the device."""
        if self.told or (training and not self.compares):
            return
        chosen = exact(pairs.policy.chosen)
        if self.compares:
            chosen = chosen - exact(pairs.reference.chosen)
        self._batches.append(torch.stack((chosen, pairs.margin)))

    def check(self) -> None:
        """Warn if chosen answers fell in the batches since the last check, the first time alone."""
        if not self._batches or self.told:
            return
        moved = torch.cat(self._batches, dim=1)
        self.reset()
        if not self.compares:
            if self._first is None or self._first.shape != moved.shape:
                self._first = moved
            moved = moved - self._first.to(moved.device)
        count = moved.shape[1]
        if count < _FEWEST:
            return
        means, errors = moved.mean(dim=1), moved.std(dim=1) / count**0.5
        (change, grown), sure = torch.stack((means, _SURE * errors)).tolist()
        if change < -sure[0] and grown > sure[1]:
            self.told = True
            log.warning(
                "chosen answers become less likely (by %.3g nats on average, of %d pairs) while "
                "the margin grows (by %.3g): the rejected ones fall faster; a term for the chosen "
                "ones (RPO, DPOP, or WeightedSum with ChosenNLL), a larger beta or a lower "
                "learning rate keeps them",
                -change, count, grown,
            )  # fmt: skip
