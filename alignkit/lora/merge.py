"""Merge adapters into the base weights, undo that, and measure what it changes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from alignkit.errors import AlignkitError
from alignkit.lora.adapter import adapter_layers, replace_module
from alignkit.lora.inject import require_adapter
from alignkit.lora.kinds import QuantizedLinear

Model = TypeVar("Model", bound=nn.Module)


def merge_lora(model: Model) -> Model:
    """Merge the active adapter into the base weights, for inference at the base's cost.

    The replaced weights are kept, so that `unmerge_lora` gives back the very same bits whatever the
    dtype; until then the adapted weights take twice their memory. A merged adapter does not train.
    A model that is merged already is left as it is.

    Raises:
        AlignkitError: No adapter is active, or the base is quantized.
    """
    require_adapter(model)
    layers = adapter_layers(model)
    packed = [path for path, layer in layers.items() if isinstance(layer.base, QuantizedLinear)]
    if packed:
        raise AlignkitError(
            f"merge: {packed[0]} is quantized, and what an adapter adds cannot be packed with it; "
            "alignkit export --to merged takes the base's plain weights (alignkit.models.quantize."
            "unquantize)"
        )
    for layer in layers.values():
        layer.merge()
    return model


def unmerge_lora(model: Model) -> Model:
    """Undo `merge_lora` exactly; a model that is not merged is left as it is."""
    for layer in adapter_layers(model).values():
        layer.unmerge()
    return model


def is_merged(model: nn.Module) -> bool:
    """Tell whether an adapter is merged into the model's weights."""
    return any(layer.merged for layer in adapter_layers(model).values())


@contextmanager
def merged_plain(model: nn.Module) -> Iterator[None]:
    """Run the block with the model merged and without wrappers, as plain transformers has it."""
    was_merged = is_merged(model)
    layers = adapter_layers(model)
    outer_first = sorted(layers, key=len)
    try:
        merge_lora(model)
        for path in outer_first:
            replace_module(model, path, layers[path].base)
        yield
    finally:
        for path in reversed(outer_first):
            replace_module(model, path, layers[path])
        if not was_merged:
            unmerge_lora(model)


@dataclass(frozen=True)
class MergeReport:
    """Hold how far merging changes a model's logits, by rounding to the base's dtype alone.

    Example:
        >>> print(MergeReport(largest=0.0125, mean=0.001, scale=9.5, tokens=64, flipped=1))
        largest logit change 0.0125 (logits up to 9.5),
        most probable token changed at 1 of 64 positions

    Attributes:
        largest: Largest absolute change of a logit.
        mean: Mean absolute change.
        scale: Largest absolute logit before, to measure the changes against.
        tokens: Positions looked at.
        flipped: Positions whose most probable token changed.
    """

    largest: float
    mean: float
    scale: float
    tokens: int
    flipped: int

    def __str__(self) -> str:
        return (
            f"largest logit change {self.largest:.3g} (logits up to {self.scale:.3g}), "
            f"most probable token changed at {self.flipped} of {self.tokens} positions"
        )


@torch.no_grad()
def merge_report(model: nn.Module, input_ids: Tensor) -> MergeReport:
    """Compare a model's logits before and after `merge_lora`; leaves the model as it found it.

    Args:
        model: A causal LM with an active adapter.
        input_ids: [B, T] token ids of some text.

    Raises:
        AlignkitError: No adapter is active.
    """
    require_adapter(model)
    was_merged, was_training = is_merged(model), model.training
    model.eval()
    try:
        before = unmerge_lora(model)(input_ids).logits.float()
        after = merge_lora(model)(input_ids).logits.float()
    finally:
        model.train(was_training)
        if was_merged:
            merge_lora(model)
        else:
            unmerge_lora(model)
    change = (after - before).abs()
    return MergeReport(
        largest=change.max().item(),
        mean=change.mean().item(),
        scale=before.abs().max().item(),
        tokens=input_ids.numel(),
        flipped=int((after.argmax(-1) != before.argmax(-1)).sum().item()),
    )
