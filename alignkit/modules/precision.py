"""Adapt Lightning's precision plugins to our modules and batches."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins import (
    DoublePrecision,
    FSDPPrecision,
    HalfPrecision,
    MixedPrecision,
    Precision,
)
from torch import Tensor, nn
from torch.optim import Optimizer

from alignkit.engine import PackedBatch
from alignkit.errors import AlignkitError
from alignkit.utils.autocast import HALF
from alignkit.utils.products import bf16_slowdown

log = logging.getLogger(__name__)
_SLOW = 4.0  # times fp32's; with bf16 instructions it is below 1
# Compared by exact class, because a subclass may do anything to a module.
_KNOWN = (Precision, MixedPrecision, HalfPrecision, DoublePrecision, FSDPPrecision)


def refuse_precision_name(precision: str | int | None) -> None:
    """Refuse Transformer Engine's fp8, before Lightning asks for the packages that it needs.

    Raises:
        AlignkitError: The precision replaces the layers that adapters wrap.
    """
    if str(precision).startswith("transformer-engine"):
        raise AlignkitError(
            f"trainer.precision={precision}: fp8 layers are not supported; use bf16-mixed, "
            "bf16-true or 32-true"
        )


def keep_batches_uncast(trainer: Trainer) -> None:
    """Keep a precision plugin from casting the tensors of a `PackedBatch`.

    Lightning maps a cast over the fields of every dataclass, which fails for a frozen one. Nothing
    in a batch may be cast anyway: token ids and positions are integers, and the reference's
    log-probabilities are fp32 in every precision.
    """
    plugin = trainer.precision_plugin
    if not isinstance(plugin.convert_input, partial):  # not replaced before
        plugin.convert_input = partial(_convert, plugin.convert_input)  # type: ignore[method-assign]


def _convert(convert: Callable[[Any], Any], data: Any) -> Any:
    return data if isinstance(data, PackedBatch) else convert(data)


def cast_before_restore(module: LightningModule, trained_in_full: bool) -> None:
    """Cast a module to its trainer's precision before a checkpoint is restored into it.

    Lightning casts after it has restored, which would round float64 weights to fp32 in between.

    Args:
        module: The module, with its trainer.
        trained_in_full: Whether all of the model trains, and not only adapters.

    Raises:
        AlignkitError: The precision is not supported, or it would round the trained weights.
    """
    plugin = module.trainer.precision_plugin
    if type(plugin) not in _KNOWN:
        raise AlignkitError(
            f"trainer.precision: {type(plugin).__name__} is not supported; use bf16-mixed, "
            "bf16-true or 32-true"
        )
    if isinstance(plugin, HalfPrecision) and trained_in_full:
        raise AlignkitError(
            f"trainer.precision={plugin.precision}: full fine-tuning (model.lora: null) keeps "
            f"master weights, which {plugin.precision} would round away; use "
            f"{plugin.precision.replace('true', 'mixed')}"
        )
    if isinstance(plugin, (HalfPrecision, DoublePrecision)):
        plugin.convert_module(module)


def step_dtype(trainer: Trainer | None, stored: torch.dtype) -> torch.dtype:
    """Return the dtype of a model's matrix products in a trainer's steps.

    Args:
        trainer: The trainer, whose precision may use autocast; ``None`` without one.
        stored: Dtype of the model's weights.
    """
    plugin = trainer.precision_plugin if trainer is not None else None
    if isinstance(plugin, MixedPrecision):
        return torch.bfloat16 if plugin.precision == "bf16-mixed" else torch.float16
    return stored


def warn_of_slow_products(trainer: Trainer, stored: torch.dtype) -> None:
    """Warn where a CPU would take many times as long for products in bf16 as for those in fp32.

    Args:
        trainer: The trainer, on its device.
        stored: Dtype of the model's weights.
    """
    on_cpu = trainer.strategy.root_device.type == "cpu"
    if not on_cpu or not trainer.is_global_zero or step_dtype(trainer, stored) != torch.bfloat16:
        return
    slowdown = bf16_slowdown()
    if slowdown > _SLOW:
        log.warning(
            "trainer.precision=%s: this CPU takes %.0f times as long for products in bf16 as in "
            "fp32; add --trainer.precision 32-true --model.dtype float32",
            trainer.precision,
            slowdown,
        )


def unscale_gradients(trainer: Trainer, optimizer: Optimizer) -> None:
    """Divide gradients by the loss scale of ``16-mixed``, if Lightning leaves that to the step.

    It does so for a fused optimizer. The gradient's norm would then be logged times the scale, and
    the gradient could not be clipped.
    """
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
        scaler.unscale_(optimizer)


def apply_but_keep_fp32(
    module: nn.Module, apply: Callable[[Callable[[Tensor], Tensor]], Any], fn: Callable[..., Any]
) -> None:
    """Run ``nn.Module._apply``, and keep fp32 what a cast to half precision would spoil.

    Buffers are a rotary embedding's frequencies, whose rounding in bf16 shifts position 300 by one;
    transformers keeps them fp32 when it loads a model in half precision. Small steps of trained
    parameters would be rounded away.

    Args:
        module: The module.
        apply: Its ``_apply``, without the argument ``fn``.
        fn: What to apply to each tensor.
    """
    before: list[tuple[dict[str, Any], str, Tensor]] = [
        (held, name, value.detach())
        for owner in module.modules()
        for held in (owner._buffers, owner._parameters)
        for name, value in held.items()
        if value is not None and value.dtype in (torch.float32, torch.float64)
        if held is owner._buffers or value.requires_grad
    ]
    apply(fn)
    for held, name, value in before:
        after = held[name]
        if after is None or after.dtype not in HALF:
            continue
        if isinstance(after, nn.Parameter):
            after.data = value.to(after.device)
        else:
            held[name] = value.to(after.device)
