"""Check that PEFT reads an adapter as alignkit does: same modules, same ranks and scales.

PEFT warns of tensors it does not find and goes on, so what it would miss is refused here, before
anything is written. It is no dependency; its rules are repeated here and held against it in tests.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, conversion_mapping
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    get_model_conversion_mapping,
)
from transformers.core_model_loading import WeightRenaming

from alignkit.errors import AlignkitError
from alignkit.lora.adapter import plain_modules
from alignkit.lora.config import LoRAConfig, first_match
from alignkit.lora.inject import only_adapter
from alignkit.lora.layer import weights_read_from_bases
from alignkit.lora.parts import is_weight_read
from alignkit.lora.regex import compiled
from alignkit.lora.targets import ALL_LINEAR, adaptable_paths, is_regex, matches

# transformers 5 keeps the experts of these families as parameters, and PEFT takes these names for
# experts wherever they stand: a dense MLP's projections go into parameters that are not there.
_TAKEN_FOR_EXPERTS = {
    "mixtral": ("gate", "w1", "w2", "w3"),
    "qwen2_moe": ("gate", "gate_proj", "up_proj", "down_proj"),
}
_FAMILIES: Mapping[str, str] = getattr(conversion_mapping, "_MODEL_TO_CONVERSION_PATTERN", {})
# PEFT adapts none of these in Mamba-like models.
_MAMBA = ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h")
_NOT_IN_MAMBA = ("conv1d", "out_proj")


def refuse_rewritten(model: nn.Module, paths: list[str]) -> None:
    """Refuse modules whose tensors PEFT would look for, or put, somewhere else.

    Args:
        model: The model, adapters injected or not.
        paths: Its low-rank modules.

    Raises:
        AlignkitError: There are some; the line names them.
    """
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if not isinstance(model, PreTrainedModel) or kind is None:
        return
    taken: tuple[str, ...] = _TAKEN_FOR_EXPERTS.get(_FAMILIES.get(kind, kind), ())
    if kind in _MAMBA:
        taken += _NOT_IN_MAMBA
    wrong = [path for path in paths if path.rpartition(".")[2] in taken]
    if get_checkpoint_conversion_mapping(kind) is not None:  # type: ignore[no-untyped-call]
        renamings = [
            transform
            for transform in get_model_conversion_mapping(model)
            if isinstance(transform, WeightRenaming)
        ]
        wrong += [path for path in paths if path not in wrong and _is_renamed(path, renamings)]
    if wrong:
        names = ", ".join(sorted({path.rpartition(".")[2] for path in wrong}))
        raise AlignkitError(
            f"export: PEFT reads {names} of {kind} ({len(wrong)} modules, such as {wrong[0]}) as "
            "other modules of the architecture and would leave the adapter's weights out; export "
            "--to merged, or train without these targets"
        )


@torch.no_grad()
def refuse_read(model: nn.Module, paths: list[str], name: str) -> None:
    """Refuse modules whose weights a model reads itself, where PEFT's adapters do not act.

    Args:
        model: The model with the adapter.
        paths: Its low-rank modules.
        name: The adapter.

    Raises:
        AlignkitError: The model would answer otherwise with PEFT; the line names the modules.
    """
    modules = plain_modules(model)
    read = [path for path in paths if is_weight_read(path, modules, partly=True)]
    if not read or not isinstance(model, PreTrainedModel):
        return
    ids = torch.arange(2, 10, device=model.device)[None]
    with only_adapter(model, name):
        ours = model(ids, use_cache=False).logits
        with weights_read_from_bases():
            theirs = model(ids, use_cache=False).logits
    if not torch.equal(ours, theirs):
        names = ", ".join(sorted({path.rpartition(".")[2] for path in read}))
        raise AlignkitError(
            f"export: {type(model).__name__} reads the weights of {names} itself, where PEFT's "
            "adapters do not act; export --to merged, or train without these targets"
        )


def _is_renamed(path: str, renamings: list[WeightRenaming]) -> bool:
    """Return whether PEFT renames an adapter's tensor, as if it came from an older checkpoint.

    A prefix that is stripped PEFT puts back.
    """
    key = renamed = f"{path}.lora_A.weight"
    for renaming in renamings:
        renamed, _ = renaming.rename_source_key(renamed)
    return not key.endswith(renamed)


def ways_to_target(
    model: nn.Module, config: LoRAConfig, adapted: list[str]
) -> Iterator[dict[str, Any]]:
    """Yield settings that may name the adapted modules to PEFT, the config's own first."""
    if not any(is_regex(t) or t == ALL_LINEAR for t in (*config.targets, *config.exclude)):
        yield {
            "target_modules": list(config.targets),
            "exclude_modules": list(config.exclude) or None,
            "layers_to_transform": None
            if config.layers is None
            else [int(i) for i in config.layers],
        }
    for names in (_portable_targets(model, adapted), sorted(adapted)):
        yield {"target_modules": names, "exclude_modules": None, "layers_to_transform": None}


def is_read(model: nn.Module, raw: Mapping[str, Any], adapted: Mapping[str, LoRAConfig]) -> bool:
    """Return whether PEFT adapts just the modules that are adapted, at their ranks and scales.

    Args:
        model: The model, adapters injected or not.
        raw: An ``adapter_config.json`` whose targets are a list, as alignkit writes it.
        adapted: The low-rank modules, each with its own ``r`` and ``alpha``.
    """
    targeted = [path for path in plain_modules(model) if path and _is_targeted(raw, path)]
    return set(targeted) == adapted.keys() and all(
        _rank_and_scale(raw, path) == (own.r, own.scale) for path, own in adapted.items()
    )


def _is_targeted(raw: Mapping[str, Any], path: str) -> bool:
    """Tell whether PEFT adapts a module, as its ``check_target_module_exists`` does for lists."""
    if _is_named(raw["exclude_modules"] or (), path):
        return False
    for name in raw["modules_to_save"] or ():
        if compiled(rf"(|.*\.){name}(|\..*)", "modules_to_save").fullmatch(path):
            return False
    targets, layers = raw["target_modules"], raw["layers_to_transform"]
    if path in targets or not layers:
        return _is_named(targets, path)
    index = re.match(r".*?\.[^.]*\.(\d+)\.", path)
    return _is_named(targets, path) and index is not None and int(index[1]) in layers


def _rank_and_scale(raw: Mapping[str, Any], path: str) -> tuple[int, float]:
    r, alpha = (
        raw[own] if (key := first_match(raw[patterns], path)) is None else raw[patterns][key]
        for own, patterns in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern"))
    )
    return r, alpha / (math.sqrt(r) if raw["use_rslora"] else r)


def _is_named(names: Iterable[str], path: str) -> bool:
    return any(path == name or path.endswith(f".{name}") for name in names)


def _portable_targets(model: nn.Module, paths: list[str]) -> list[str]:
    """Return the last parts of modules' paths where they are exact, and whole paths elsewhere."""
    endings = sorted({path.rpartition(".")[2] for path in paths})
    meant = {path for path in adaptable_paths(model) if any(matches(end, path) for end in endings)}
    return endings if meant == set(paths) else sorted(paths)
