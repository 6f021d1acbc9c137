"""Put LoRA adapters into a model, choose the active one, and count and group what trains."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import nn
from transformers import PreTrainedModel

from alignkit.errors import AlignkitError
from alignkit.lora.adapter import (
    FROZEN,
    AdapterLayer,
    TrainedModule,
    adapter_layers,
    plain_modules,
    replace_module,
)
from alignkit.lora.config import LoRAConfig
from alignkit.lora.kinds import QuantizedLinear, weight_shape
from alignkit.lora.layer import LoRAEmbedding, LoRALinear
from alignkit.lora.targets import ALL_LINEAR, all_linear, resolve, saved_modules, shared_weight
from alignkit.utils.deferred import held

log = logging.getLogger(__name__)

Model = TypeVar("Model", bound=nn.Module)


def inject_lora(
    model: Model,
    config: LoRAConfig | None = None,
    name: str = "default",
    *,
    linear: type[LoRALinear] = LoRALinear,
) -> Model:
    """Add a new LoRA adapter to a model and freeze the rest; the adapter becomes the active one.

    Args:
        model: Any module with linear layers, usually a transformers causal LM. Changed in place.
        config: What to adapt and how; by default ``all-linear`` with rank 8.
        name: Letters, digits, ``-`` and ``_``; further adapters on one base take further names.
        linear: The class of adapted linear layers: a subclass of `LoRALinear` is a variant of your
            own. What its factors mean, ``x W + s · x A B``, has to stay, as checkpoints and exports
            say no more; how they start and what of them is trained is free.

    Returns:
        The model itself. Its ``save_pretrained`` refuses from here on;
        `alignkit.models.export.export` writes adapters and merged models.

    Raises:
        AlignkitError: A name in use, a merged model, or a config that does not fit the model; the
            model is then unchanged.
    """
    config = config or LoRAConfig()
    layers = adapter_layers(model)
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise AlignkitError(f"adapter name {name!r}: use letters, digits, '-' and '_'")
    if name in adapter_configs(model):
        raise AlignkitError(f"the model already has an adapter {name!r}; choose another name")
    refuse_merged(layers)
    targets = resolve(model, config)
    trained = trained_parameters(model, config, targets)
    modules = plain_modules(model)
    # Every new layer is made before any is put in, so that a failure changes nothing.
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    made: dict[str, AdapterLayer] = {}
    try:
        for path, own in targets.items():
            kind = LoRAEmbedding if isinstance(modules[path], nn.Embedding) else linear
            with held(modules[path]):
                made[path] = kind(modules[path], own, name)
    except AlignkitError:
        for parameter in trainable:
            parameter.requires_grad_(True)
        raise
    for path, names in trained.items():
        with held(modules[path]):
            made[path] = TrainedModule(modules[path], config, names, name)
    for path, layer in made.items():
        if path in layers and type(layers[path]) is not type(layer):
            raise AlignkitError(
                f"adapter {name!r}: {path} trains whole in one adapter and by low rank in another; "
                "put them on separate copies of the model"
            )
    if ALL_LINEAR in config.targets and (told := str(all_linear(model))):
        log.warning("LoRA: all-linear leaves out %s", told)
    model.requires_grad_(False)
    for path in sorted(made, key=len, reverse=True):  # modules before those that hold them
        if path in layers:
            layers[path].adapters[name] = made[path].adapters[name]
        else:
            replace_module(model, path, made[path])
    model.alignkit_adapters = {**adapter_configs(model), name: config}  # type: ignore[assignment]
    if isinstance(model, PreTrainedModel):
        model.save_pretrained = _refuse_to_save  # type: ignore[method-assign]
        if shared_weight(modules, list(made)) is not None:
            model.config.tie_word_embeddings = False
    set_adapter(model, name)
    return model


def _refuse_to_save(*_: object, **__: object) -> None:
    """Refuse ``save_pretrained``, which would write layers under names that no reader knows."""
    raise AlignkitError(
        "save_pretrained: the model has adapters; write it with "
        "alignkit.models.export.export(model, directory, to='merged') or to='peft'"
    )


def trained_parameters(
    model: nn.Module, config: LoRAConfig, targets: dict[str, LoRAConfig]
) -> dict[str, tuple[str, ...]]:
    """Return the parameters an adapter trains as they are, by module.

    Args:
        model: The model.
        config: The adapter's config.
        targets: Its low-rank modules, see `alignkit.lora.targets.resolve`.
    """
    modules = plain_modules(model)
    trained = {
        path: tuple(name for name, _ in modules[path].named_parameters(recurse=False))
        for path in saved_modules(model, config)
    }
    if config.bias == "all":
        for path, module in modules.items():
            if path and module._parameters.get("bias") is not None and path not in targets:
                trained.setdefault(path, ("bias",))
    return trained


def refuse_merged(layers: dict[str, AdapterLayer]) -> None:
    """Refuse to change adapters while one is merged."""
    if any(layer.merged for layer in layers.values()):
        raise AlignkitError("an adapter is merged into the model; call unmerge_lora first")


def adapter_configs(model: nn.Module) -> dict[str, LoRAConfig]:
    """Return the config each adapter of the model was made from, by name."""
    configs: dict[str, LoRAConfig] = getattr(model, "alignkit_adapters", {})
    return configs


def active_adapter(model: nn.Module) -> str | None:
    """Return the name of the adapter in use, ``None`` where there is none."""
    active = {layer.active for layer in adapter_layers(model).values()}
    return next((name for name in adapter_configs(model) if name in active), None)


def require_adapter(model: nn.Module, name: str | None = None) -> str:
    """Return ``name``, or the active adapter's for ``None``.

    Raises:
        AlignkitError: The model has no such adapter, or none is active.
    """
    names = list(adapter_configs(model))
    if not names:
        raise AlignkitError("the model has no adapter; call inject_lora or load_adapter first")
    if name is None:
        name = active_adapter(model)
        if name is None:
            raise AlignkitError(f"no adapter is active; call set_adapter with {' or '.join(names)}")
    if name not in names:
        raise AlignkitError(f"the model has no adapter {name!r}; it has {', '.join(names)}")
    return name


def set_adapter(model: nn.Module, name: str | None, trainable: bool = True) -> None:
    """Set the active adapter of a model; ``None`` for the base alone.

    Args:
        model: A model with adapters.
        name: The adapter to use.
        trainable: Whether its parameters then require gradients; no other adapter's do.

    Raises:
        AlignkitError: No such adapter, or another one is merged.
    """
    layers = adapter_layers(model)
    if name is not None:
        require_adapter(model, name)
        if name != active_adapter(model):
            refuse_merged(layers)
    for layer in layers.values():
        layer.active = name
        for other, adapter in layer.adapters.items():
            for key, parameter in adapter.named_parameters():
                parameter.requires_grad_(trainable and other == name and key not in FROZEN)


@contextmanager
def adapters_disabled(model: nn.Module) -> Iterator[None]:
    """Run the block with the base model alone, exactly as it was before any adapter."""
    layers = adapter_layers(model)
    active = {path: layer.active for path, layer in layers.items()}
    try:
        for layer in layers.values():
            layer.active = None
        yield
    finally:
        for path, layer in layers.items():
            layer.active = active[path]


@contextmanager
def only_adapter(model: nn.Module, name: str) -> Iterator[None]:
    """Run the block in eval mode with one adapter beside the base, merged nowhere."""
    layers = adapter_layers(model)
    active = {path: layer.active for path, layer in layers.items()}
    merged = [layer for layer in layers.values() if layer.merged]
    training = [module for module in model.modules() if module.training]
    try:
        for layer in layers.values():
            layer.unmerge()
            layer.active = name
        model.eval()
        yield
    finally:
        for path, layer in layers.items():
            layer.active = active[path]
        for layer in merged:
            layer.merge()
        for module in training:
            module.training = True


def trainable_parameter_count(model: nn.Module) -> int:
    """Return how many numbers the optimizer would change, shared parameters counted once."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def base_parameter_count(model: nn.Module) -> int:
    """Return the size of the model without its adapters, shared parameters counted once.

    Packed weights count as what they stand for.
    """
    seen: dict[int, int] = {}
    for module in plain_modules(model).values():
        for name, parameter in module.named_parameters(recurse=False):
            packed = isinstance(module, QuantizedLinear) and name == "weight"
            seen[id(parameter)] = math.prod(weight_shape(module)) if packed else parameter.numel()
    return sum(seen.values())


def lora_parameter_groups(
    model: nn.Module, lr: float, ratio: float = 16.0, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Divide the trainable parameters into groups for LoRA+ (Hayou et al. 2024, arXiv:2402.12354).

    B of every linear layer learns ``ratio`` times as fast as everything else: ``η_B = λ η_A``, λ
    about 2⁴ in the paper. In an embedding it is A that starts at zero, so neither is sped up.

    Args:
        model: A model with adapters.
        lr: Learning rate of A and of every other trainable parameter.
        ratio: λ.
        weight_decay: For both groups.

    Returns:
        Parameter groups for any torch optimizer, the second with ``lr · ratio``.
    """
    b_matrices = {
        id(adapter.lora_B)
        for layer in adapter_layers(model).values()
        if isinstance(layer, LoRALinear)
        for adapter in layer.adapters.values()
    }
    trainable = [p for p in model.parameters() if p.requires_grad]
    fast = [p for p in trainable if id(p) in b_matrices]
    slow = [p for p in trainable if id(p) not in b_matrices]
    groups = [
        {"params": slow, "lr": lr, "weight_decay": weight_decay},
        {"params": fast, "lr": lr * ratio, "weight_decay": weight_decay},
    ]
    return [group for group in groups if group["params"]]
