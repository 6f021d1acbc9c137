"""Compute exactly weighted means of losses and metrics over an epoch and over all ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from alignkit.modules.window import LossOutput
from alignkit.utils.exact import exact_dtype


class ExactMetric(Metric):
    """Hold states that stay in the dtype of sums (`exact_dtype`) whatever a module is cast to."""

    full_state_update = False

    def _apply(self, fn: Callable[..., Any], exclude_state: Sequence[str] = "") -> Self:
        """Apply a module's move to another device, and ignore its casts."""

        def move(tensor: Tensor) -> Tensor:
            device = fn(tensor.float()).device  # a device may have no float64
            return tensor.to(device, exact_dtype(device))

        super()._apply(move, exclude_state)
        return self


class WeightedMean(ExactMetric):
    """Compute ``Σ totals / Σ weights`` over batches and ranks, in float64.

    torchmetrics' ``MeanMetric`` takes each batch's quotient instead of its sum, and checks for NaN
    at every update, which waits for the device.

    Example:
        >>> mean = WeightedMean()
        >>> mean.update(torch.tensor(6.0), weight=3)
        >>> mean.update(torch.tensor(2.0), weight=1)
        >>> mean.compute()
        tensor(2.)
    """

    total: Tensor
    weight: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        zero = torch.zeros((), dtype=torch.float64)
        self.add_state("total", zero, dist_reduce_fx="sum")
        self.add_state("weight", zero.clone(), dist_reduce_fx="sum")

    def update(self, total: Tensor, weight: float | Tensor) -> None:
        """Add a batch's sum and its weight."""
        # Not in place: a tensor made under inference mode cannot be changed outside of it.
        self.total = self.total + total.detach()
        self.weight = self.weight + weight

    def compute(self) -> Tensor:
        """Return the mean, fp32; NaN if nothing was added."""
        return (self.total / self.weight).float()


class Perplexity(WeightedMean):
    """Compute the perplexity, ``exp`` of the mean cross-entropy in nats."""

    def compute(self) -> Tensor:
        """Return the perplexity, fp32."""
        return super().compute().exp()


class EpochSums:
    """Sum losses and metrics over the epoch's optimizer steps on this rank.

    Only steps that were taken count. A resumed run repeats the micro-batches of an open window, and
    thus still counts each of them once.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def clear(self) -> None:
        """Forget the sums, at the start of an epoch."""
        self._sums = {}

    def add(self, output: LossOutput) -> None:
        """Add one optimizer step, whose sums are float64 and whose weight is a tensor."""
        sums: dict[str, Any] = {"loss": output.loss_sum, "weight": output.weight, **output.metrics}
        for name, value in sums.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value

    def total(self) -> LossOutput | None:
        """Return the sums, ``None`` if no step was taken."""
        if not self._sums:
            return None
        metrics = dict(self._sums)
        return LossOutput(metrics.pop("loss"), metrics.pop("weight"), metrics)

    def state(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """Return the sums over all ranks, on the CPU; every rank must call it.

        Args:
            reduce: Sums a [K] float64 tensor over all ranks.
        """
        names = sorted(self._sums)
        if not names:
            return {}
        sums_K = reduce(torch.stack([self._sums[name] for name in names])).cpu()
        return dict(zip(names, sums_K.unbind(), strict=True))

    def load(self, state: Mapping[str, Tensor], device: torch.device, rank: int) -> None:
        """Continue from a `state`: rank 0 takes the sums, the others start from 0."""
        mine = {name: value * (rank == 0) for name, value in state.items()}
        self._sums = {n: value.to(device, exact_dtype(device)) for n, value in mine.items()}


class EpochMetrics(nn.Module):
    """Aggregate the loss and every metric of a stage's `LossOutput`s over an epoch."""

    anchor: Tensor

    def __init__(self, perplexity: bool = False) -> None:
        super().__init__()
        self.means = nn.ModuleDict()
        self.perplexity = perplexity
        # A buffer moves with the module, so it tells the device on which to make a new metric.
        self.register_buffer("anchor", torch.empty(0), persistent=False)

    def update(self, output: LossOutput) -> None:
        """Add one batch to the means."""
        totals = {"loss": output.loss_sum, **output.metrics}
        if self.perplexity:
            totals["perplexity"] = output.loss_sum
        for name, total in totals.items():
            self._mean(name).update(total, output.weight)

    def reset(self) -> None:
        """Forget the sums, which an interrupted epoch may have left."""
        for mean in self.means.values():
            mean.reset()  # type: ignore[operator]

    def named(self) -> dict[str, WeightedMean]:
        """Return the metrics by name, the same names on every rank.

        A rank that saw no batch knows no names, and still must take part in every reduction.
        """
        names = list(self.means)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            gathered: list[list[str]] = [[] for _ in range(torch.distributed.get_world_size())]
            torch.distributed.all_gather_object(gathered, names)
            names = sorted({name for rank in gathered for name in rank})
        return {name: self._mean(name) for name in names}

    def _mean(self, name: str) -> WeightedMean:
        if name not in self.means:
            kind = Perplexity if name == "perplexity" else WeightedMean
            self.means[name] = kind().to(self.anchor.device)
        mean: WeightedMean = self.means[name]  # type: ignore[assignment]
        return mean
