"""Provide what Lightning's tuners and monitors need: a learning rate, and comparable losses."""

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
    """Return a batch's mean loss, with the gradient of the sum.

    Callbacks such as `SpikeDetection` compare losses from batch to batch, and a sum grows with its
    batch. The gradient must be that of the sum, because a window adds up gradients of sums.

    Args:
        loss_sum: Scalar, the sum of the batch's losses.
        weight: The number of tokens or pairs that it is the sum over.

    Raises:
        AlignkitError: The sum carries no gradient.
    """
    if torch.is_grad_enabled() and not loss_sum.requires_grad:
        raise AlignkitError("the loss of a batch carries no gradient; leave out .detach()")
    mean: Tensor = _MeanWithSumGradient.apply(loss_sum, weight)  # type: ignore[no-untyped-call]
    return mean


class _MeanWithSumGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss_sum: Tensor, weight: float | Tensor) -> Tensor:
        if isinstance(weight, Tensor):
            return loss_sum / weight.to(loss_sum.device).clamp(min=1e-30)
        return loss_sum / max(weight, 1e-30)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def learning_rate(make: OptimizerCallable) -> float:
    """Return the learning rate of the optimizers that a function makes.

    Args:
        make: A function from parameters to an optimizer.

    Raises:
        AlignkitError: Its optimizer has no learning rate.
    """
    optimizer = make([nn.Parameter(torch.zeros(1))])
    if "lr" not in optimizer.defaults:
        raise AlignkitError(
            f"model.optimizer: {type(optimizer).__name__} has no learning rate to find or set"
        )
    return float(optimizer.defaults["lr"])


def with_learning_rate(make: OptimizerCallable, lr: float) -> OptimizerCallable:
    """Return a function that makes the same optimizer with another learning rate."""
    return partial(_make_at_rate, make.args[0] if is_replaced(make) else make, lr)  # type: ignore[attr-defined]


def is_replaced(make: OptimizerCallable) -> bool:
    """Tell whether a function was returned by `with_learning_rate`."""
    return isinstance(make, partial) and make.func is _make_at_rate


def _make_at_rate(make: OptimizerCallable, lr: float, parameters: Iterable[Any]) -> Optimizer:
    groups = list(parameters)
    chosen = [isinstance(group, dict) and "lr" in group for group in groups]
    optimizer = make(groups)
    optimizer.defaults["lr"] = lr
    # A list of parameters makes one group; a group with its own rate keeps it.
    for number, group in enumerate(optimizer.param_groups):
        if not (number < len(chosen) and chosen[number]):
            group["lr"] = lr
    return optimizer
