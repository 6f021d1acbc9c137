"""Fold adapters into the base and take them out again, and mix several into one."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from alignkit.lora.adapter import adapter_layers
from alignkit.lora.inject import require_adapter

Model = TypeVar("Model", bound=nn.Module)


def merge_lora(model: Model) -> Model:
    """Fold the active adapter into the base weights, for inference at the base's cost.

    The replaced weights are kept, so that `unmerge_lora` gives back the very same bits whatever the
    dtype; until then the adapted weights take twice their memory. While merged the adapter does not
    train. A merged model stays merged.

    Raises:
        AlignkitError: No adapter is active.
    """
    require_adapter(model)
    for layer in adapter_layers(model).values():
        layer.merge()
    return model


def unmerge_lora(model: Model) -> Model:
    """Undo `merge_lora`, bit for bit; a model that is not merged is left as it is."""
    for layer in adapter_layers(model).values():
        layer.unmerge()
    return model
