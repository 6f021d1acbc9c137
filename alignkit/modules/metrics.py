"""Epoch means, weighted exactly, over all ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from alignkit.modules.window import LossOutput


class WeightedMean(Metric):
    """``Σ totals / Σ weights`` over batches and ranks, in float64.

    torchmetrics' ``MeanMetric`` would need each batch's quotient first and looks for NaNs on the
    device at every update, which waits for it.
    """

    full_state_update = False
    total: Tensor
    weight: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        zero = torch.zeros((), dtype=torch.float64)
        self.add_state("total", zero, dist_reduce_fx="sum")
        self.add_state("weight", zero.clone(), dist_reduce_fx="sum")

    def update(self, total: Tensor, weight: float | Tensor) -> None:
        """Add a batch's sum and what it weighs."""
        # Not in place: a state made under inference mode could not be changed outside of it.
        self.total = self.total + total.detach()
        self.weight = self.weight + weight

    def _apply(self, fn: Callable[..., Any], exclude_state: Sequence[str] = "") -> WeightedMean:
        """Move as the module moves; its casts are none of a sum's business."""
        super()._apply(lambda tensor: tensor.to(fn(tensor).device), exclude_state)
        return self

    def compute(self) -> Tensor:
        """Return the mean, fp32; NaN when nothing was added."""
        return (self.total / self.weight).float()


class Perplexity(WeightedMean):
    """``exp`` of the mean cross-entropy in nats."""

    def compute(self) -> Tensor:
        """Return the perplexity, fp32."""
        return super().compute().exp()


class EpochSums:
    """This rank's sums over the optimizer steps of an epoch so far.

    A step counts when it was taken, so that a resumed run, which goes through an open window
    again, counts every micro-batch once.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def clear(self) -> None:
        """Begin an epoch."""
        self._sums = {}

    def add(self, output: LossOutput) -> None:
        """Add a step: sums in float64, its weight a tensor."""
        sums: dict[str, Any] = {"loss": output.loss_sum, "weight": output.weight, **output.metrics}
        for name, value in sums.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value

    def total(self) -> LossOutput | None:
        """Return the sums, ``None`` where no step was taken."""
        if not self._sums:
            return None
        metrics = dict(self._sums)
        return LossOutput(metrics.pop("loss"), metrics.pop("weight"), metrics)

    def state(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """Return the sums over all ranks, on the host; a collective.

        Args:
            reduce: Sums a [K] float64 tensor over all ranks.
        """
        names = sorted(self._sums)
        if not names:
            return {}
        sums_K = reduce(torch.stack([self._sums[name] for name in names])).cpu()
        return dict(zip(names, sums_K.unbind(), strict=True))

    def load(self, state: Mapping[str, Tensor], device: torch.device, rank: int) -> None:
        """Continue from a `state`, which one rank takes over for all."""
        self._sums = {name: value.to(device) * (rank == 0) for name, value in state.items()}


class EpochMetrics(nn.Module):
    """The loss and every metric that a stage's `LossOutput`s name, aggregated over an epoch."""

    anchor: Tensor

    def __init__(self, perplexity: bool = False) -> None:
        super().__init__()
        self.means = nn.ModuleDict()
        self.perplexity = perplexity
        # Follows the module to its device, where metrics first met on the way are made.
        self.register_buffer("anchor", torch.empty(0), persistent=False)

    def update(self, output: LossOutput) -> None:
        """Add one batch."""
        totals = {"loss": output.loss_sum, **output.metrics}
        if self.perplexity:
            totals["perplexity"] = output.loss_sum
        for name, total in totals.items():
            self._mean(name).update(total, output.weight)

    def reset(self) -> None:
        """Forget what an epoch that was cut off has left."""
        for mean in self.means.values():
            mean.reset()  # type: ignore[operator]

    def named(self) -> dict[str, WeightedMean]:
        """Return the metrics by name, the same names on every rank.

        A rank that saw no batch has met no names, yet must take part in every reduction.
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
