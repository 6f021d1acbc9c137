"""Save adapters in PEFT's format, and load them from it; files that do not fit are refused."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from alignkit.errors import AlignkitError
from alignkit.lora.adapter import adapter_layers, plain_modules
from alignkit.lora.config import LoRAConfig
from alignkit.lora.init import SUBTRACTED
from alignkit.lora.inject import (
    adapter_configs,
    inject_lora,
    refuse_merged,
    require_adapter,
    set_adapter,
    trained_parameters,
)
from alignkit.lora.peft_files import (
    CONFIG_FILE,
    CONFIG_KEY,
    WEIGHTS_FILE,
    AdapterFiles,
    read_adapter,
    write_tensors,
)
from alignkit.lora.peft_format import (
    PREFIX,
    config_from_peft,
    config_to_peft,
    low_rank_paths,
    peft_shapes,
    peft_tensors,
    saved_names,
)
from alignkit.lora.peft_reader import refuse_read, refuse_rewritten
from alignkit.lora.resize import fit_embeddings, undo_resize, with_tied
from alignkit.lora.state import refuse_differences
from alignkit.lora.targets import pruned, resolve, saved_modules, shared_weight
from alignkit.utils.atomic import write_atomically
from alignkit.utils.finite import first_nonfinite

log = logging.getLogger(__name__)

Model = TypeVar("Model", bound=nn.Module)


def save_adapter(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    name: str | None = None,
    base: str | None = None,
    plain: bool = False,
    header: Mapping[str, str] = MappingProxyType({}),
) -> Path:
    """Write one adapter as a directory in PEFT's format.

    Args:
        model: A model with adapters.
        directory: Made if missing; an adapter already there is replaced.
        name: The adapter; the active one by default.
        base: Where the base model is found, recorded for readers; by default what the model says.
        plain: Write a PiSSA or OLoRA adapter as ordinary LoRA of twice the rank,
            ``[A A₀] [B; -B₀]`` (PiSSA's appendix C), for readers that know no such starts.
        header: Further entries of the tensor file's header, which readers ignore.

    Returns:
        The directory.

    Raises:
        AlignkitError: No such adapter, one that PEFT would not read as it is, or one that holds
            NaN or infinity; nothing is written.
    """
    name = require_adapter(model, name)
    config, tensors = _to_peft(model, name, base, plain)
    refuse_rewritten(model, low_rank_paths(model, name))
    refuse_read(model, low_rank_paths(model, name), name)
    directory = Path(directory)
    write_tensors(directory / WEIGHTS_FILE, tensors, header)
    write_atomically(directory / CONFIG_FILE, json.dumps(config, indent=2))
    _fitting(model, read_adapter(directory), untie=True)
    return directory


def save_adapter_file(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    name: str | None = None,
    base: str | None = None,
    plain: bool = False,
    header: Mapping[str, str] = MappingProxyType({}),
) -> Path:
    """Write one adapter as a single safetensors file, its config as JSON in the header.

    Arguments and errors are `save_adapter`'s; returns the file's path.
    """
    config, tensors = _to_peft(model, name, base, plain)
    path = Path(path)
    write_tensors(path, tensors, {CONFIG_KEY: json.dumps(config), **header})
    _fitting(model, read_adapter(path), untie=True)
    return path


def _to_peft(
    model: nn.Module, name: str | None, base: str | None, plain: bool
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    name = require_adapter(model, name)
    config = adapter_configs(model)[name]
    raw = config_to_peft(model, config, name, base or base_name(model), plain)
    tensors = {
        key: (tensor.t() if matrix else tensor).contiguous().cpu()
        for key, (tensor, matrix) in peft_tensors(model, name, plain).items()
    }
    bad = first_nonfinite(tensors.items())
    if bad is not None:
        raise AlignkitError(f"export: {bad} holds NaN or infinity; use an earlier checkpoint")
    return raw, tensors


def load_adapter(
    model: Model,
    path: str | os.PathLike[str],
    *,
    name: str = "default",
    trainable: bool = True,
    untie: bool = False,
) -> Model:
    """Give a model an adapter from PEFT's directory format and make it the active one.

    Where the model already has an adapter of that name, its values are replaced, provided it is
    built alike.

    Args:
        model: The base model, with or without adapters. Changed in place.
        path: The directory that `save_adapter` or PEFT wrote, or `save_adapter_file`'s file.
        name: What to call the adapter here.
        trainable: Whether it goes on training.
        untie: Allow an adapter on one side of tied embeddings, as `LoRAConfig.untie`.

    Returns:
        The model itself.

    Raises:
        AlignkitError: Files missing, damaged or leading outside the directory; another method than
            LoRA; tensors missing, unexpected, of another shape or base. The model is unchanged.
    """
    files = read_adapter(Path(path))
    refuse_merged(adapter_layers(model))
    before = fit_embeddings(model, files.tensors)
    try:
        config, targets, expected, given = _fitting(model, files, untie)
    except AlignkitError:
        undo_resize(model, before)
        raise
    _warn_of_other_base(model, files.config, files.tensors_path)
    if name in adapter_configs(model):
        _refuse_other_build(model, name, targets, expected, files.tensors_path)
    else:
        inject_lora(model, config, name)
    with torch.no_grad():
        for key, (tensor, matrix) in peft_tensors(model, name).items():
            tensor.copy_(given[key].t() if matrix else given[key])
    set_adapter(model, name, trainable)
    return model


def adapter_config(
    model: nn.Module, path: str | os.PathLike[str], *, untie: bool = False
) -> LoRAConfig:
    """Return the config that `load_adapter` would give a model from a directory or file.

    Raises:
        AlignkitError: As `load_adapter`, for what concerns the settings alone.
    """
    return _config_on(model, read_adapter(Path(path)), untie)


class Fitting(NamedTuple):
    """Hold an adapter read from files, once it is known to fit a model.

    Example:
        >>> fitting = Fitting(LoRAConfig(), {}, {"lora_A": (8, 3)}, {"lora_A": torch.ones(8, 3)})
        >>> fitting.given["lora_A"].shape == fitting.expected["lora_A"]
        True

    Attributes:
        config: Its config.
        targets: Its low-rank modules by path, each with its own config.
        expected: The shapes of its tensors, by PEFT's names.
        given: Their values.
    """

    config: LoRAConfig
    targets: dict[str, LoRAConfig]
    expected: dict[str, tuple[int, ...]]
    given: dict[str, Tensor]


def _fitting(model: nn.Module, files: AdapterFiles, untie: bool) -> Fitting:
    """Check that an adapter's config and tensors fit a model, and return both."""
    config = _config_on(model, files, untie)
    targets = resolve(model, config)
    expected = peft_shapes(model, config, targets, trained_parameters(model, config, targets))
    given = _without_base(model, files.tensors, expected, files.tensors_path)
    refuse_differences(given, expected, files.tensors_path)
    return Fitting(config, targets, expected, given)


def _config_on(model: nn.Module, files: AdapterFiles, untie: bool) -> LoRAConfig:
    """Convert PEFT's settings to ours for a model, without the entries that match nothing."""
    config = config_from_peft(files.config, files.config_path)
    saved = saved_names(model, config.modules_to_save, to_peft=False)
    config = pruned(model, dataclasses.replace(config, untie=untie, modules_to_save=saved))
    touched = [*resolve(model, config), *saved_modules(model, config)]
    tied = shared_weight(plain_modules(model), touched)
    if tied is not None and files.config.get("ensure_weight_tying"):
        config = with_tied(config, files, [path for path in tied[1] if path not in touched])
    return dataclasses.replace(config, untie=tied is not None)


def base_name(model: nn.Module) -> str | None:
    """Return the base model's name or path by its config; ``None`` where there is none."""
    return getattr(getattr(model, "config", None), "_name_or_path", None) or None


def _without_base(
    model: nn.Module,
    given: dict[str, Tensor],
    expected: Mapping[str, tuple[int, ...]],
    where: str,
) -> dict[str, Tensor]:
    """Remove the base weights and copies that PEFT writes beside an adapter.

    Base weights must be those of this base. PEFT saves whole embeddings where one is adapted, and
    with ``bias="all"`` the biases of ``modules_to_save`` under the names of its wrappers a second
    and third time.
    """
    kept: dict[str, Tensor] = {}
    modules = plain_modules(model)
    layers = adapter_layers(model)
    for key, tensor in given.items():
        if re.sub(r"\.(original_module|modules_to_save\.[^.]+)\.", ".", key) in {*given} - {key}:
            continue
        path, _, parameter = key.removeprefix(PREFIX).replace(".base_layer.", ".").rpartition(".")
        if key in expected or parameter not in getattr(modules.get(path), "_parameters", {}):
            kept[key] = tensor
            continue
        owner = layers.get(path)
        base = owner.original(parameter) if owner else modules[path].get_parameter(parameter)
        if base.shape != tensor.shape or not torch.equal(base.cpu(), tensor.to(base.dtype)):
            raise AlignkitError(
                f"{where}: {key} differs from the model's; load the base the adapter was trained on"
            )
    return kept


def _warn_of_other_base(model: nn.Module, raw: Mapping[str, Any], where: str) -> None:
    theirs, ours = raw.get("base_model_name_or_path"), base_name(model)
    if theirs and ours and theirs != ours:
        log.warning("%s was trained on %s; the model here is %s", where, theirs, ours)


def _refuse_other_build(
    model: nn.Module,
    name: str,
    targets: Mapping[str, LoRAConfig],
    expected: Mapping[str, tuple[int, ...]],
    where: str,
) -> None:
    """Refuse to fill an adapter whose tensors or arithmetic differ from the file's."""
    own = {
        key: tensor.t() if matrix else tensor
        for key, (tensor, matrix) in peft_tensors(model, name).items()
    }
    refuse_differences(own, expected, f"adapter {name!r} of the model, compared with {where},")
    layers = adapter_layers(model)
    for path, theirs in targets.items():
        ours = layers[path].adapter(name).config
        for field in ("scale", "init"):
            a, b = getattr(theirs, field), getattr(ours, field)
            if a != b and (field != "init" or {a, b} & set(SUBTRACTED)):
                raise AlignkitError(
                    f"{where}: {path} has {field} {a}, adapter {name!r} of the model has {b}; "
                    "load it under another name or into a fresh model"
                )
