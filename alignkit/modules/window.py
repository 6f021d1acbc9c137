"""Sum losses over the micro-batches of an optimizer step, and compute their exact mean.

Lightning divides every micro-batch's loss by the constant ``accumulate_grad_batches`` and DDP
averages gradients over ranks, whatever the token counts. Modules therefore return the *sum* of
their loss, and the window scales to ``Σ loss / Σ weight`` once, before the optimizer steps.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from alignkit.engine import PackedBatch
from alignkit.modules.sharding import local_gradients
from alignkit.utils.exact import exact, exact_dtype


@dataclass(frozen=True)
class LossOutput:
    """Hold the loss, the weight and the metrics of one micro-batch, as sums.

    Example:
        >>> losses_B = torch.tensor([0.5, 0.75])
        >>> LossOutput(losses_B.sum(), weight=len(losses_B)).loss_sum
        tensor(1.2500)

    Attributes:
        loss_sum: Scalar, the loss summed (not averaged) over the units that ``weight`` counts.
        weight: The number of tokens (language modelling) or pairs (preferences) in the batch.
        metrics: Name to scalar, each a sum over the same units as ``weight``; logged as means.
    """

    loss_sum: Tensor
    weight: float | Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


class MicroBatch(NamedTuple):
    """Hold one micro-batch of a window, until the window is closed.

    Example:
        >>> from alignkit.batch import Example, collate
        >>> MicroBatch(collate([Example([1], [[2, 3]])]), number=0).batch.num_scored
        2

    Attributes:
        batch: The batch, on the module's device.
        number: Its number in the epoch, from 0.
    """

    batch: PackedBatch
    number: int


class Window:
    """Sum losses and metrics over the micro-batches of one optimizer step on this rank."""

    def __init__(self) -> None:
        self.micro_batches: list[MicroBatch] = []
        self._sums: dict[str, Tensor] = {}
        self._start = time.perf_counter()

    def restart_clock(self) -> None:
        """Forget the time that passed outside of training steps."""
        self._start = time.perf_counter()

    def clear(self) -> None:
        """Forget what was added, when its optimizer step is not going to be taken."""
        self.micro_batches = []
        self._sums = {}

    def add(self, output: LossOutput, batch: PackedBatch, number: int = 0) -> None:
        """Add one micro-batch, without waiting for the device."""
        loss = output.loss_sum.detach().float()
        own = {"loss": loss, "weight": output.weight, "tokens": batch.num_tokens}
        for name, value in {**own, **output.metrics}.items():
            if not isinstance(value, Tensor):
                value = torch.full_like(loss, value, dtype=exact_dtype(loss.device))
            value = exact(value.detach())
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
        # Gloo reduces in place, so it gets a copy.
        sums = dict(zip(names, reduce(own_K.clone()).unbind(), strict=True))
        seconds = time.perf_counter() - self._start
        micro_batches = self.micro_batches
        self.__init__()  # type: ignore[misc]
        weight, tokens = sums.pop("weight"), sums.pop("tokens")
        # A window without a scored token has zero gradients, which 0 / 0 would turn into NaN.
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
    """Hold the means of one optimizer step over all micro-batches and ranks.

    Example:
        >>> from alignkit.batch import Example, collate
        >>> window = Window()
        >>> window.add(LossOutput(torch.tensor(3.0), 2), collate([Example([1], [[2, 3]])]))
        >>> window.close(reduce=lambda sums_K: sums_K).means  # one rank
        {'loss': tensor(1.5000)}

    Attributes:
        means: ``loss`` and every metric, scalars in fp32, each divided by ``weight``.
        weight: Scalar fp32, the number of tokens or pairs in the step.
        tokens_per_second: Row tokens of all ranks per second of wall time.
        own: This rank's part, as sums in float64.
        micro_batches: This rank's micro-batches.
    """

    means: dict[str, Tensor]
    weight: Tensor
    tokens_per_second: Tensor
    own: LossOutput
    micro_batches: list[MicroBatch]


def scale_gradients(parameters: list[Tensor], factor: Tensor) -> None:
    """Multiply gradients in place by a scalar tensor, without waiting for its value."""
    gradients = local_gradients(parameters)
    if gradients:
        torch._foreach_mul_(gradients, factor.to(gradients[0].device))
