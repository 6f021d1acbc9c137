"""The optimizer over what trains, and the learning rate's course over the run's steps."""

from __future__ import annotations

import math

from lightning.pytorch import Trainer
from lightning.pytorch.cli import OptimizerCallable
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler

from alignkit.errors import AlignkitError
from alignkit.lora import lora_parameter_groups

CONSTANT = "constant_with_warmup"


def check_rates(warmup_steps: float, lora_plus_ratio: float) -> None:
    """Refuse numbers that would train at other rates than anyone meant, before a model is loaded.

    Raises:
        AlignkitError: One is negative or no number; the line names it.
    """
    if not 0 <= warmup_steps < math.inf:
        raise AlignkitError(f"model.warmup_steps={warmup_steps}: must be 0 or more")
    if not 0 < lora_plus_ratio < math.inf:
        raise AlignkitError(f"model.lora_plus_ratio={lora_plus_ratio}: must be positive")


def make_optimizer(model: nn.Module, make: OptimizerCallable, lora_plus_ratio: float) -> Optimizer:
    """Return the optimizer over a model's trainable parameters.

    Args:
        model: In which what does not train is frozen.
        make: From parameters or groups of them to an optimizer.
        lora_plus_ratio: Learning rate of every B over that of A; 1 for one group.

    Raises:
        AlignkitError: The optimizer refuses its options, whoever's it is.
    """
    try:
        optimizer = make([p for p in model.parameters() if p.requires_grad])
    except ValueError as error:
        raise AlignkitError(f"{error}; change --model.optimizer") from error
    if lora_plus_ratio != 1:
        chosen = optimizer.defaults
        groups = lora_parameter_groups(
            model, chosen["lr"], lora_plus_ratio, chosen.get("weight_decay", 0.0)
        )
        optimizer = make(groups)
    return optimizer


def total_steps(trainer: Trainer) -> int | None:
    """Return how many optimizer steps a run takes, ``None`` where nothing but time ends it."""
    total = trainer.estimated_stepping_batches
    return int(total) if 0 <= total < math.inf else None


def make_schedule(
    optimizer: Optimizer, name: str, warmup_steps: float, total: int | None
) -> LRScheduler:
    """Return the course of the learning rate, one value a step.

    Args:
        optimizer: Its learning rates are where warm-up ends.
        name: Of transformers' ``get_scheduler``.
        warmup_steps: Steps of linear warm-up; below 1, a fraction of ``total``.
        total: See `total_steps`.

    Raises:
        AlignkitError: The course depends on a number of steps that the run does not have.
    """
    fraction = 0 < warmup_steps < 1
    if total is None and (fraction or name != CONSTANT):
        what = f"warmup_steps={warmup_steps}" if fraction else f"schedule={name}"
        instead = "a number of steps" if fraction else CONSTANT
        raise AlignkitError(
            f"model.{what}: the run has no number of steps to go by; set trainer.max_steps (or "
            f"trainer.max_epochs), or choose {instead}"
        )
    schedule: LRScheduler = get_scheduler(
        name,
        optimizer,
        num_warmup_steps=round(warmup_steps * (total or 0) if fraction else warmup_steps),
        num_training_steps=total,
    )
    return schedule
