"""What Lightning's tuners and watchers look for: a learning rate to set, a loss to compare."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.optim import Optimizer

from alignkit.errors import AlignkitError


def mean_with_gradient_of_sum(loss_sum: Tensor, weight: float | Tensor) -> Tensor:
    """Return a batch's mean loss, whose gradient is that of the sum.

    Watchers compare losses from batch to batch, and sums grow with a batch's size; gradients of
    sums are what a window adds up.

    Args:
        loss_sum: Scalar.
        weight: What it is the sum over.
    """
    mean: Tensor = _Mean.apply(loss_sum, weight)  # type: ignore[no-untyped-call]
    return mean


class _Mean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss_sum: Tensor, weight: float | Tensor) -> Tensor:
        if isinstance(weight, Tensor):
            return loss_sum / weight.to(loss_sum.device).clamp(min=1e-30)
        return loss_sum / max(weight, 1e-30)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def learning_rate(make: OptimizerCallable) -> float:
    """Return the learning rate that a function from parameters to an optimizer has inside.

    Raises:
        AlignkitError: Its optimizer has none.
    """
    optimizer = make([nn.Parameter(torch.zeros(1))])
    if "lr" not in optimizer.defaults:
        raise AlignkitError(
            f"model.optimizer: {type(optimizer).__name__} has no learning rate to find or set"
        )
    return float(optimizer.defaults["lr"])


def with_learning_rate(make: OptimizerCallable, lr: float) -> OptimizerCallable:
    """Return the function with another learning rate."""
    return partial(_make, make.args[0] if is_replaced(make) else make, lr)  # type: ignore[attr-defined]


def is_replaced(make: OptimizerCallable) -> bool:
    """Whether a function comes from `with_learning_rate`."""
    return isinstance(make, partial) and make.func is _make


def _make(make: OptimizerCallable, lr: float, parameters: Iterable[Any]) -> Optimizer:
    groups = list(parameters)
    chosen = [isinstance(group, dict) and "lr" in group for group in groups]
    optimizer = make(groups)
    optimizer.defaults["lr"] = lr
    # Bare parameters make one group; a group with a rate of its own keeps it.
    for number, group in enumerate(optimizer.param_groups):
        if not (number < len(chosen) and chosen[number]):
            group["lr"] = lr
    return optimizer
