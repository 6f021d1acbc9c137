"""Add a weighted sum of several LoRA adapters as one further adapter, without approximation."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from alignkit.errors import AlignkitError
from alignkit.lora.adapter import Adapter, AdapterLayer, adapter_layers
from alignkit.lora.config import BiasMode, LoRAConfig
from alignkit.lora.inject import adapter_configs, inject_lora, require_adapter
from alignkit.lora.layer import LowRankLayer

Model = TypeVar("Model", bound=nn.Module)


def combine_adapters(model: Model, weights: Mapping[str, float], name: str) -> Model:
    """Add a weighted sum of a model's adapters as a further adapter, and make it active.

    ``ΔW = Σ w_i s_i A_i B_i`` holds exactly: the new A and B are the others' side by side, so the
    new rank is the sum of theirs (PEFT's ``cat``). A parameter that adapters train in full becomes
    the base's plus the weighted sum of their differences from it.

    Args:
        model: A model with the adapters to mix.
        weights: Weight by adapter name; negative ones subtract.
        name: The new adapter's name.

    Returns:
        The model itself.

    Raises:
        AlignkitError: Unknown names, no weights, or a DoRA adapter, whose effect is no sum.
    """
    configs = [adapter_configs(model)[require_adapter(model, other)] for other in weights]
    if not configs:
        raise AlignkitError("combine_adapters: no weights given; name at least one adapter")
    if any(config.use_dora for config in configs):
        raise AlignkitError("combine_adapters: a DoRA adapter rescales W and cannot be summed")
    mixed = {
        path: _mix(layer, parts)
        for path, layer in adapter_layers(model).items()
        if (parts := [(layer.adapter(o), w) for o, w in weights.items() if o in layer.adapters])
    }
    inject_lora(model, _config(model, configs, mixed), name)
    layers = adapter_layers(model)
    with torch.no_grad():
        for path, values in mixed.items():
            for key, value in values.items():
                layers[path].adapter(name).get_parameter(key).copy_(value)
    return model


@torch.no_grad()
def _mix(layer: AdapterLayer, parts: list[tuple[Adapter, float]]) -> dict[str, Tensor]:
    """Return the mixed parameters of one module."""
    mixed: dict[str, Tensor] = {}
    factors: list[tuple[Tensor, Tensor]] = []
    for adapter, weight in parts:
        if isinstance(layer, LowRankLayer):
            a_IR, b_RO = adapter.factors()
            factors.append((a_IR, b_RO * (weight * adapter.config.scale)))
        for key, value in adapter.named_parameters():
            if isinstance(layer, LowRankLayer) and key != "bias":
                continue
            original = layer.original(key).float()
            mixed[key] = mixed.get(key, original) + weight * (value - original)
    if factors:
        mixed["lora_A"] = torch.cat([a_IR for a_IR, _ in factors], dim=1)
        mixed["lora_B"] = torch.cat([b_RO for _, b_RO in factors])
    return mixed


def _config(
    model: nn.Module, configs: list[LoRAConfig], mixed: Mapping[str, Mapping[str, Tensor]]
) -> LoRAConfig:
    """Return the new adapter's config, with α = r everywhere, so that its scale is 1."""
    ranks = {
        path: values["lora_A"].shape[1] for path, values in mixed.items() if "lora_A" in values
    }
    common = max(ranks.values(), default=1)
    others = {re.escape(path): rank for path, rank in ranks.items() if rank != common}
    modes: tuple[BiasMode, ...] = ("none", "lora_only", "all")
    return LoRAConfig(
        r=common,
        alpha=common,
        targets=tuple(ranks),
        rank_pattern=others,
        alpha_pattern={pattern: float(rank) for pattern, rank in others.items()},
        init="kaiming",
        bias=max((config.bias for config in configs), key=modes.index),
        modules_to_save=tuple(dict.fromkeys(n for c in configs for n in c.modules_to_save)),
        untie=any(config.untie for config in configs),
    )
