"""Convert configs and tensor names to PEFT's directory format and back.

PEFT keeps A as [R, I] and B as [O, R] for Linear and Conv1D alike; alignkit's are [I, R] and
[R, O], so every matrix is transposed on the way.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from alignkit.errors import AlignkitError
from alignkit.lora.adapter import FROZEN, adapter_layers, plain_modules
from alignkit.lora.config import LoRAConfig, strings
from alignkit.lora.init import SUBTRACTED
from alignkit.lora.kinds import stores_rows_of_outputs, weight_shape
from alignkit.lora.layer import LoRAEmbedding, LowRankLayer
from alignkit.lora.peft_reader import is_read, ways_to_target
from alignkit.lora.targets import ALL_LINEAR, is_regex

PREFIX = "base_model.model."

_LINEAR_NAMES = {
    "lora_A": "lora_A.weight",
    "lora_B": "lora_B.weight",
    "magnitude": "lora_magnitude_vector",
    "bias": "base_layer.bias",
}
_EMBEDDING_NAMES = {
    "lora_A": "lora_embedding_A",
    "lora_B": "lora_embedding_B",
    "magnitude": "lora_magnitude_vector",
}
_INIT_TO_PEFT = {"kaiming": True}
# PEFT's inits that leave the base weight alone, so that the saved A and B say everything.
_INIT_FROM_PEFT: dict[Any, Any] = {
    True: "kaiming",
    False: "kaiming",
    "eva": "kaiming",
    **{name: name for name in ("gaussian", "pissa", "olora", "orthogonal")},
}
# Fields of PEFT's LoraConfig that `_read` takes over, and those that change no computation. Any
# other that is set is refused: it may be a variant that alignkit does not know.
_READ = frozenset(
    {
        "peft_type", "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules",
        "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "use_rslora",
        "use_dora", "init_lora_weights", "bias", "modules_to_save",
    }
)  # fmt: skip
_WITHOUT_EFFECT = frozenset(
    {
        "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "task_type",
        "peft_version", "runtime_config", "fan_in_fan_out",
        # Of starts that leave the base alone, or are refused by `init_lora_weights` themselves.
        "eva_config", "loftq_config", "corda_config", "lora_ga_config",
        # Of variants that another field turns on.
        "megatron_core", "qalora_group_size",
        # Matters only where embeddings are tied: see `alignkit.lora.io`.
        "ensure_weight_tying",
    }
)  # fmt: skip


def peft_tensors(
    model: nn.Module, name: str, plain: bool = False
) -> dict[str, tuple[Tensor, bool]]:
    """Return an adapter's tensors under PEFT's names, and whether PEFT's are transposed.

    The live parameters, to read or to fill; with ``plain``, a subtracted start is part of A and B.
    """
    named: dict[str, tuple[Tensor, bool]] = {}
    for path, layer in adapter_layers(model).items():
        if name not in layer.adapters:
            continue
        names = _EMBEDDING_NAMES if isinstance(layer, LoRAEmbedding) else _LINEAR_NAMES
        adapter = layer.adapter(name)
        values: dict[str, Tensor] = {k: v for k, v in adapter.named_parameters() if k not in FROZEN}
        if plain and isinstance(layer, LowRankLayer):
            values |= zip(("lora_A", "lora_B"), adapter.factors(), strict=True)
        for key, parameter in values.items():
            matrix = key in ("lora_A", "lora_B")
            suffix = names[key] if isinstance(layer, LowRankLayer) else key
            named[f"{PREFIX}{path}.{suffix}"] = (parameter.detach(), matrix)
    return named


def peft_shapes(
    model: nn.Module,
    config: LoRAConfig,
    targets: Mapping[str, LoRAConfig],
    trained: Mapping[str, tuple[str, ...]],
) -> dict[str, tuple[int, ...]]:
    """Return the tensors PEFT's file must hold for a config on a model, with PEFT's shapes."""
    modules = plain_modules(model)
    shapes: dict[str, tuple[int, ...]] = {}
    for path, own in targets.items():
        module = modules[path]
        shape = weight_shape(module)
        inputs, outputs = shape[::-1] if stores_rows_of_outputs(module) else shape
        names = _EMBEDDING_NAMES if isinstance(module, nn.Embedding) else _LINEAR_NAMES
        own_shapes: dict[str, tuple[int, ...]] = {
            "lora_A": (own.r, inputs), "lora_B": (outputs, own.r)
        }  # fmt: skip
        if config.use_dora:
            own_shapes["magnitude"] = (outputs,)
        if config.bias != "none" and module._parameters.get("bias") is not None:
            own_shapes["bias"] = (outputs,)
        shapes |= {f"{PREFIX}{path}.{names[key]}": shape for key, shape in own_shapes.items()}
    for path, keys in trained.items():
        for key in keys:
            shapes[f"{PREFIX}{path}.{key}"] = tuple(modules[path].get_parameter(key).shape)
    return shapes


def low_rank_paths(model: nn.Module, name: str) -> list[str]:
    """Return the modules an adapter of a model changes by low rank."""
    return [
        path
        for path, layer in adapter_layers(model).items()
        if name in layer.adapters and isinstance(layer, LowRankLayer)
    ]


def config_to_peft(
    model: nn.Module, config: LoRAConfig, name: str, base: str | None, plain: bool = False
) -> dict[str, Any]:
    """Return PEFT's ``adapter_config.json`` for an adapter of a model.

    Args:
        model: The model with the adapter.
        config: What the adapter was made from.
        name: The adapter.
        base: Recorded as the base model's name or path.
        plain: Describe a subtracted start as ordinary LoRA of twice the rank.

    Raises:
        AlignkitError: An option that PEFT has no equal for.
    """
    adapted = low_rank_paths(model, name)
    has_conv1d = any(isinstance(plain_modules(model)[path], Conv1D) for path in adapted)
    if plain:
        config = _plain(config)
    if config.init == "olora" and has_conv1d:
        raise AlignkitError(
            "export: PEFT cannot express init='olora' on Conv1D layers (its factors come out in "
            "the wrong shape); export with plain=True or merged"
        )
    raw = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "auto_mapping": None,
        "base_model_name_or_path": base,
        "revision": None,
        "inference_mode": True,
        "r": config.r,
        "lora_alpha": _number(config.alpha),
        "lora_dropout": config.dropout,
        "layers_pattern": None,
        "rank_pattern": config.rank_pattern,
        "alpha_pattern": {key: _number(value) for key, value in config.alpha_pattern.items()},
        "fan_in_fan_out": has_conv1d,
        "bias": config.bias,
        "use_rslora": config.use_rslora,
        "use_dora": config.use_dora,
        "init_lora_weights": _INIT_TO_PEFT.get(config.init, config.init),
        "modules_to_save": list(saved_names(model, config.modules_to_save, to_peft=True)) or None,
    }
    own = {path: config.for_module(path) for path in adapted}
    for targets in ways_to_target(model, config, adapted):
        if is_read(model, {**raw, **targets}, own):
            return {**raw, **targets}
    raise AlignkitError(
        f"export: no list of names tells PEFT to adapt just these {len(adapted)} modules at their "
        "ranks; export --to merged"
    )


def config_from_peft(raw: Mapping[str, Any], where: str) -> LoRAConfig:
    """Return the config PEFT's ``adapter_config.json`` describes.

    Args:
        raw: The file's content.
        where: The file, for messages.

    Raises:
        AlignkitError: Another method than LoRA, or an option alignkit has no equal for.
    """
    try:
        return _read(raw)
    except (AlignkitError, AttributeError, TypeError, ValueError) as error:
        raise AlignkitError(f"{where}: {error}") from None


def _read(raw: Mapping[str, Any]) -> LoRAConfig:
    method = raw.get("peft_type")
    if method != "LORA":
        raise AlignkitError(f"peft_type is {method!r}; alignkit reads LORA adapters only")
    for name in sorted(raw.keys() - _READ - _WITHOUT_EFFECT):
        if raw[name]:
            raise AlignkitError(f"{name} is set, which alignkit cannot express; retrain without")
    init = raw.get("init_lora_weights", True)
    if not isinstance(init, (bool, str)) or init not in _INIT_FROM_PEFT:
        raise AlignkitError(
            f"init_lora_weights is {init!r}, whose change to the base cannot be repeated from the "
            "file; let PEFT save it with path_initial_model_for_weight_conversion"
        )
    targets = raw.get("target_modules")
    if targets is None:
        raise AlignkitError("target_modules is missing; name the adapted modules")
    layers = raw.get("layers_to_transform")
    layers = (layers,) if isinstance(layers, int) else (layers or None)
    return LoRAConfig(
        r=raw.get("r", 8),
        alpha=raw.get("lora_alpha", 8),
        dropout=raw.get("lora_dropout", 0.0),
        targets=_targets_from_peft(targets, layers, raw.get("layers_pattern")),
        exclude=_patterns_from_peft(raw.get("exclude_modules") or ()),
        layers=None if raw.get("layers_pattern") else layers,
        rank_pattern=raw.get("rank_pattern") or {},
        alpha_pattern=raw.get("alpha_pattern") or {},
        use_rslora=bool(raw.get("use_rslora")),
        use_dora=bool(raw.get("use_dora")),
        init=_INIT_FROM_PEFT[init],
        bias=raw.get("bias", "none"),
        modules_to_save=strings(raw.get("modules_to_save") or ()),
    )


def _plain(config: LoRAConfig) -> LoRAConfig:
    """Return a config of twice the rank and the same scale, where a start is subtracted."""
    if config.init not in SUBTRACTED:
        return config
    factor = math.sqrt(2) if config.use_rslora else 2
    return dataclasses.replace(
        config,
        init="kaiming",
        r=2 * config.r,
        alpha=factor * config.alpha,
        rank_pattern={key: 2 * r for key, r in config.rank_pattern.items()},
        alpha_pattern={key: factor * alpha for key, alpha in config.alpha_pattern.items()},
    )


def saved_names(
    model: nn.Module, names: tuple[str, ...] | str, *, to_peft: bool
) -> tuple[str, ...]:
    """Convert the names of ``modules_to_save`` between alignkit's rule and PEFT's.

    alignkit's names match a path's end at a dot, PEFT's at any letter: ``norm`` is ``model.norm``
    here, and every ``input_layernorm`` too in PEFT. Where the two rules disagree on a model, whole
    paths are returned, which mean the same under both. From PEFT, names that match nothing are
    removed, as PEFT does.
    """
    paths = [path for path in plain_modules(model) if path]
    if not to_peft:
        names = tuple(name for name in names if any(path.endswith(name) for path in paths))
    ours = [p for p in paths if any(p == name or p.endswith(f".{name}") for name in names)]
    theirs = [p for p in paths if any(p.endswith(name) for name in names)]
    if ours == theirs:
        return strings(names)
    return tuple(ours if to_peft else theirs)


def _targets_from_peft(value: Any, layers: Any, layers_pattern: Any) -> tuple[str, ...]:
    """Return the targets, as one expression that holds the layers if ``layers_pattern`` is set."""
    names = _patterns_from_peft(value)
    if not layers_pattern or not layers:
        return names
    blocks = "|".join(strings(layers_pattern))
    indices = "|".join(map(str, layers))
    return (rf"(.*\.)?({blocks})\.({indices})\.(.*\.)?({'|'.join(map(re.escape, names))})",)


def _patterns_from_peft(value: Any) -> tuple[str, ...]:
    """Convert PEFT's names: a string is one expression over whole paths, a list holds endings."""
    if not isinstance(value, str):
        return tuple(sorted(value))
    if value == ALL_LINEAR or is_regex(value):
        return (value,)
    return (f"^{value}$",)


def _number(value: float) -> float | int:
    return int(value) if float(value).is_integer() else value
