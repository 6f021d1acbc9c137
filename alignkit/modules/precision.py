"""What Lightning's precisions do to a module and its batches, and what they must leave alone."""

from __future__ import annotations

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

_HALF = (torch.bfloat16, torch.float16)
# By class: a subclass of Lightning's own may do anything to a module.
_KNOWN = (Precision, MixedPrecision, HalfPrecision, DoublePrecision, FSDPPrecision)


def refuse_by_name(precision: str | int | None) -> None:
    """Refuse what `convert_early` would, before Lightning asks for packages that it needs.

    Raises:
        AlignkitError: A precision whose layers take the place of those that adapters wrap.
    """
    if str(precision).startswith("transformer-engine"):
        raise AlignkitError(
            f"trainer.precision={precision}: fp8 layers are not supported; use bf16-mixed, "
            "bf16-true or 32-true"
        )


def leave_batches(trainer: Trainer) -> None:
    """Let packed batches through a precision's conversion of inputs as they are.

    Lightning maps a cast over the fields of every dataclass, which a frozen one does not allow, and
    nothing in a batch may be cast: token ids and positions are integers, and log-probabilities of a
    reference are fp32 whatever the model computes in.
    """
    plugin = trainer.precision_plugin
    if not isinstance(plugin.convert_input, partial):  # once a plugin
        plugin.convert_input = partial(_convert, plugin.convert_input)  # type: ignore[method-assign]


def _convert(convert: Callable[[Any], Any], data: Any) -> Any:
    return data if isinstance(data, PackedBatch) else convert(data)


def convert_early(module: LightningModule, trained_in_full: bool) -> None:
    """Cast a module as its trainer's precision will, before a checkpoint is restored into it.

    Lightning casts after it has restored, which would round float64 weights to fp32 on the way.

    Raises:
        AlignkitError: The precision is not one that alignkit trains in, or it would round the
            weights that are trained.
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


def computed_in(trainer: Trainer | None, stored: torch.dtype) -> torch.dtype:
    """Return the dtype that a model's products have in a trainer's steps.

    Args:
        trainer: Whose precision may put autocast around a step; ``None`` where there is none.
        stored: Of the model's weights.
    """
    plugin = trainer.precision_plugin if trainer is not None else None
    if isinstance(plugin, MixedPrecision):
        return torch.bfloat16 if plugin.precision == "bf16-mixed" else torch.float16
    return stored


def unscale(trainer: Trainer, optimizer: Optimizer) -> None:
    """Divide gradients by the loss scale of ``16-mixed``, unless Lightning has done so.

    It leaves that to the step of a fused optimizer, so that the gradient's norm would be logged
    times the scale and could not be clipped.
    """
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
        scaler.unscale_(optimizer)


def apply_but_keep_buffers(
    module: nn.Module, apply: Callable[[Callable[[Tensor], Tensor]], Any], fn: Callable[..., Any]
) -> None:
    """Run ``nn.Module._apply`` so that casts to half precision leave fp32 buffers fp32.

    A rotary embedding's frequencies are buffers: in bf16 they put token 300 at position 301.
    transformers keeps them fp32 when it loads a model in half precision.
    """
    before = [
        (owner, name, buffer)
        for owner in module.modules()
        for name, buffer in owner._buffers.items()
        if buffer is not None and buffer.dtype in (torch.float32, torch.float64)
    ]
    apply(fn)
    for owner, name, buffer in before:
        after = owner._buffers[name]
        if after is not None and after.dtype in _HALF:
            owner._buffers[name] = buffer.to(after.device)
