"""Make the optimizer of the trainable parameters, and the learning rate's schedule."""

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
from alignkit.utils.autocast import HALF

CONSTANT = "constant_with_warmup"


def check_rates(warmup_steps: float, lora_plus_ratio: float, lora: object) -> None:
    """Refuse numbers that would train at other rates than anyone meant, before a model is loaded.

    Args:
        warmup_steps: As in `make_schedule`.
        lora_plus_ratio: As in `make_optimizer`.
        lora: The adapters to train; ``None`` for the whole model.

    Raises:
        AlignkitError: One is negative or no number; the line names it.
    """
    if not 0 <= warmup_steps < math.inf:
        raise AlignkitError(f"model.warmup_steps={warmup_steps}: must be 0 or more")
    if not 0 < lora_plus_ratio < math.inf:
        raise AlignkitError(f"model.lora_plus_ratio={lora_plus_ratio}: must be positive")
    if lora is None:
        _refuse_plus_without_adapters(lora_plus_ratio)


def _refuse_plus_without_adapters(ratio: float) -> None:
    if ratio != 1:
        raise AlignkitError(
            f"model.lora_plus_ratio={ratio}: there is no B of an adapter that could learn faster; "
            "leave it out, or adapt linear layers (model.lora)"
        )


def make_optimizer(model: nn.Module, make: OptimizerCallable, lora_plus_ratio: float) -> Optimizer:
    """Return the optimizer over a model's trainable parameters.

    Args:
        model: The model, with all other parameters frozen.
        make: A function from parameters, or from groups of them, to an optimizer.
        lora_plus_ratio: Learning rate of every B over that of A; with 1 there is one group.

    Raises:
        AlignkitError: The optimizer refuses its options, or a parameter is in half precision.
    """
    halves = [n for n, p in model.named_parameters() if p.requires_grad and p.dtype in HALF]
    if halves:
        raise AlignkitError(
            f"model: {halves[0]} trains in half precision, which would round small steps away; "
            "keep it in fp32, and set trainer.precision to bf16-mixed"
        )
    try:
        optimizer = make([p for p in model.parameters() if p.requires_grad])
    except ValueError as error:
        raise AlignkitError(f"{error}; change --model.optimizer") from error
    if lora_plus_ratio != 1:
        chosen = optimizer.defaults
        groups = lora_parameter_groups(
            model, chosen["lr"], lora_plus_ratio, chosen.get("weight_decay", 0.0)
        )
        if not any(group["lr"] != chosen["lr"] for group in groups):
            _refuse_plus_without_adapters(lora_plus_ratio)
        optimizer = make(groups)
    return optimizer


def total_steps(trainer: Trainer, taken: int = 0) -> int | None:
    """Return the number of optimizer steps of a run, ``None`` if it ends by time alone.

    Args:
        trainer: The run's trainer.
        taken: Steps taken before the run was resumed. They need not be as many as its epochs have
            now: on fewer ranks an epoch may have more steps.
    """
    total = trainer.estimated_stepping_batches
    if not 0 <= total < math.inf:
        return None
    epochs, whole = trainer.max_epochs, trainer.limit_train_batches == 1.0
    count = getattr(trainer.datamodule, "steps_ahead", None)  # type: ignore[attr-defined]
    if taken and epochs is not None and epochs > 0 and whole and count is not None:
        ahead = count(epochs)
        if ahead is not None:
            most = trainer.max_steps if trainer.max_steps >= 0 else math.inf
            total = min(taken + max(ahead, 0), most)
    return int(total)


def make_schedule(
    optimizer: Optimizer, name: str, warmup_steps: float, total: int | None
) -> LRScheduler:
    """Return the schedule of the learning rate, with one value for each optimizer step.

    Args:
        optimizer: The optimizer, with the learning rates that warm-up ends at.
        name: A name of transformers' ``get_scheduler``.
        warmup_steps: Steps of linear warm-up; below 1, a fraction of ``total``.
        total: The run's number of steps; see `total_steps`.

    Raises:
        AlignkitError: The schedule needs the number of steps, and the run has none.
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
