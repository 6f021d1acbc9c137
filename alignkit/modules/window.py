"""What one optimizer step adds up, and the mean it is worth.

Lightning divides every micro-batch's loss by the constant ``accumulate_grad_batches`` and DDP
averages gradients over ranks, whatever the token counts. Modules therefore return the *sum* of
their loss, and the window puts ``Σ loss / Σ weight`` right once, before the optimizer steps.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class LossOutput:
    """What a module says of one micro-batch.

    Attributes:
        loss_sum: Scalar, the loss summed (not averaged) over what ``weight`` counts.
        weight: How much the batch weighs: tokens for language modelling, pairs for preferences.
        metrics: Name to scalar, each a sum over the same units as ``weight``; logged as means.
    """

    loss_sum: Tensor
    weight: float | Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


class Window:
    """Sums over the micro-batches of one optimizer step on this rank."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._start = time.perf_counter()

    def restart_clock(self) -> None:
        """Forget the time that passed outside of training steps."""
        self._start = time.perf_counter()

    def add(self, output: LossOutput, tokens: int) -> None:
        """Add one micro-batch; nothing here waits for the device."""
        loss = output.loss_sum.detach().float()
        entries = {"loss": loss, "weight": output.weight, "tokens": tokens, **output.metrics}
        for name, value in entries.items():
            if isinstance(value, Tensor):
                value = value.detach().to(torch.float64)
            else:
                value = loss.new_full((), value, dtype=torch.float64)
            self._sums[name] = self._sums[name] + value if name in self._sums else value

    def close(self, reduce: Callable[[Tensor], Tensor]) -> WindowTotals:
        """Sum over ranks in one collective, start over, and return the step's totals.

        Args:
            reduce: Sums a [K] float64 tensor over all ranks.
        """
        names = sorted(self._sums)
        totals = reduce(torch.stack([self._sums[name] for name in names]))
        sums = dict(zip(names, totals.unbind(), strict=True))
        seconds = time.perf_counter() - self._start
        self.__init__()  # type: ignore[misc]
        weight, tokens = sums.pop("weight"), sums.pop("tokens")
        # A window without a single scored token has zero gradients; keep them finite.
        weight = weight.clamp(min=torch.finfo(torch.float32).tiny)
        means = {name: (value / weight).float() for name, value in sums.items()}
        return WindowTotals(means, weight.float(), (tokens / seconds).float())


@dataclass(frozen=True)
class WindowTotals:
    """One optimizer step over all micro-batches and ranks.

    Attributes:
        means: ``loss`` and every metric, divided by ``weight``.
        weight: What the step weighs in total.
        tokens_per_second: Row tokens of all ranks per second of wall time.
    """

    means: dict[str, Tensor]
    weight: Tensor
    tokens_per_second: Tensor


def scale_gradients(parameters: list[Tensor], factor: Tensor) -> None:
    """Multiply gradients in place by a scalar tensor, without waiting for its value."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if gradients:
        torch._foreach_mul_(gradients, factor.to(gradients[0].device))
