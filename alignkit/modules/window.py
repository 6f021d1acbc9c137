"""What one optimizer step adds up, and the mean it is worth.

Lightning divides every micro-batch's loss by the constant ``accumulate_grad_batches`` and DDP
averages gradients over ranks, whatever the token counts. Modules therefore return the *sum* of
their loss, and the window puts ``Σ loss / Σ weight`` right once, before the optimizer steps.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from alignkit.engine import PackedBatch


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


class MicroBatch(NamedTuple):
    """One micro-batch of a window, kept until the window is closed.

    Attributes:
        batch: On the module's device.
        number: Which of its epoch, from 0.
    """

    batch: PackedBatch
    number: int


class Window:
    """Sums over the micro-batches of one optimizer step on this rank."""

    def __init__(self) -> None:
        self.micro_batches: list[MicroBatch] = []
        self._sums: dict[str, Tensor] = {}
        self._start = time.perf_counter()

    def restart_clock(self) -> None:
        """Forget the time that passed outside of training steps."""
        self._start = time.perf_counter()

    def clear(self) -> None:
        """Forget what was added, as the gradients of a step that is never taken are."""
        self.micro_batches = []
        self._sums = {}

    def add(self, output: LossOutput, batch: PackedBatch, number: int = 0) -> None:
        """Add one micro-batch; nothing here waits for the device."""
        loss = output.loss_sum.detach().float()
        own = {"loss": loss, "weight": output.weight, "tokens": batch.num_tokens}
        for name, value in {**own, **output.metrics}.items():
            if isinstance(value, Tensor):
                value = value.detach().to(torch.float64)
            else:
                value = loss.new_full((), value, dtype=torch.float64)
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self.micro_batches.append(MicroBatch(batch, number))

    def close(self, reduce: Callable[[Tensor], Tensor]) -> WindowTotals:
        """Sum over ranks in one collective, start over, and return the step's totals.

        Args:
            reduce: Sums a [K] float64 tensor over all ranks.
        """
        names = sorted(self._sums)
        own_K = torch.stack([self._sums[name] for name in names])
        own = dict(zip(names, own_K.unbind(), strict=True))
        del own["tokens"]
        # Gloo reduces in place.
        sums = dict(zip(names, reduce(own_K.clone()).unbind(), strict=True))
        seconds = time.perf_counter() - self._start
        micro_batches = self.micro_batches
        self.__init__()  # type: ignore[misc]
        weight, tokens = sums.pop("weight"), sums.pop("tokens")
        # A window without a single scored token has zero gradients; keep them finite.
        weight = weight.clamp(min=torch.finfo(torch.float32).tiny)
        means = {name: (value / weight).float() for name, value in sums.items()}
        return WindowTotals(
            means,
            weight.float(),
            (tokens / seconds).float(),
            LossOutput(own.pop("loss"), own.pop("weight"), own),
            micro_batches,
        )


@dataclass(frozen=True)
class WindowTotals:
    """One optimizer step over all micro-batches and ranks.

    Attributes:
        means: ``loss`` and every metric, divided by ``weight``.
        weight: What the step weighs in total.
        tokens_per_second: Row tokens of all ranks per second of wall time.
        own: This rank's part of it, as sums in float64.
        micro_batches: This rank's.
    """

    means: dict[str, Tensor]
    weight: Tensor
    tokens_per_second: Tensor
    own: LossOutput
    micro_batches: list[MicroBatch]


def scale_gradients(parameters: list[Tensor], factor: Tensor) -> None:
    """Multiply gradients in place by a scalar tensor, without waiting for its value."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if gradients:
        torch._foreach_mul_(gradients, factor.to(gradients[0].device))
