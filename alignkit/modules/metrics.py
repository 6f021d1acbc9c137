"""Epoch means, weighted exactly, over all ranks."""

from __future__ import annotations

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
        self.total += total.detach()
        self.weight += weight

    def compute(self) -> Tensor:
        """Return the mean, fp32; NaN when nothing was added."""
        return (self.total / self.weight).float()


class Perplexity(WeightedMean):
    """``exp`` of the mean cross-entropy in nats."""

    def compute(self) -> Tensor:
        """Return the perplexity, fp32."""
        return super().compute().exp()


class EpochMetrics(nn.Module):
    """The loss and every metric that a stage's `LossOutput`s name, aggregated over an epoch."""

    def __init__(self, perplexity: bool = False) -> None:
        super().__init__()
        self.means = nn.ModuleDict()
        self.perplexity = perplexity

    def update(self, output: LossOutput) -> None:
        """Add one batch."""
        for name, total in {"loss": output.loss_sum, **output.metrics}.items():
            self._mean(name, WeightedMean, total.device).update(total, output.weight)
        if self.perplexity:
            loss = output.loss_sum
            self._mean("perplexity", Perplexity, loss.device).update(loss, output.weight)

    def compute(self) -> dict[str, Tensor]:
        """Return name to mean over all ranks, and start over."""
        values = {}
        for name in sorted(self._names_on_all_ranks()):
            kind = Perplexity if name == "perplexity" else WeightedMean
            mean = self._mean(name, kind, self._device())
            values[name] = mean.compute()
            mean.reset()
        return values

    def _mean(self, name: str, kind: type[WeightedMean], device: torch.device) -> WeightedMean:
        if name not in self.means:
            self.means[name] = kind().to(device)
        mean = self.means[name]
        assert isinstance(mean, WeightedMean)
        return mean

    def _names_on_all_ranks(self) -> set[str]:
        # A rank that saw no batch has met no names, yet must take part in every reduction.
        names = list(self.means)
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return set(names)
        gathered: list[list[str]] = [[] for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather_object(gathered, names)
        return {name for rank in gathered for name in rank}

    def _device(self) -> torch.device:
        for mean in self.means.values():
            assert isinstance(mean, WeightedMean)
            return mean.total.device
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
