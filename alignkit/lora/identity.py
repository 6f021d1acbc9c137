"""Compare adapters by the settings that decide which function their tensors compute.

Two adapters whose tensors have equal names and shapes are the same only if they also have the same
scale, subtract the same kind of start and adapt the same modules. Dropout and the random first
draw do not count: they affect training, and not the function.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import torch
import xxhash
from torch import Tensor, nn

from alignkit.lora.adapter import Adapter, adapter_layers, plain_modules
from alignkit.lora.config import LoRAConfig
from alignkit.lora.init import SUBTRACTED
from alignkit.lora.inject import active_adapter, adapter_configs, trained_parameters
from alignkit.lora.layer import LowRankLayer
from alignkit.lora.targets import resolve
from alignkit.utils.deferred import actual

Identity = dict[str, dict[str, Any]]
"""By module path, the module's own `_FIELDS`, or names of the parameters it trains in full."""

UNTRAINED = xxhash.xxh3_128().hexdigest()
"""The `trained_fingerprint` of an adapter that changes nothing, and so of any base without one."""
_FIELDS = ("r", "alpha", "use_rslora", "use_dora", "init", "bias")
_SHOWN = 8


def identity(model: nn.Module, config: LoRAConfig) -> Identity:
    """Return the settings of a config's adapter on a model, by module, injected already or not.

    Raises:
        AlignkitError: The config does not fit the model.
    """
    targets = resolve(model, config)
    modules = plain_modules(model)
    meant: Identity = {}
    for path, own in targets.items():
        meant[path] = {field: getattr(own, field) for field in _FIELDS}
        if modules[path]._parameters.get("bias") is None:
            meant[path]["bias"] = "none"
    trained = trained_parameters(model, config, targets)
    return meant | {path: {"trained": list(names)} for path, names in trained.items()}


def active_identity(model: nn.Module) -> Identity | None:
    """Return `identity` of the adapter in use, ``None`` for a model without one."""
    name = active_adapter(model)
    return None if name is None else identity(model, adapter_configs(model)[name])


def difference(theirs: Identity | None, ours: Identity | None) -> str | None:
    """Describe how two adapters differ, with both values and the option to pass.

    Args:
        theirs: Of the checkpoint or adapter that was given; ``None`` for training in full.
        ours: Of the model that it is to be loaded into.

    Returns:
        ``lora.alpha is 8 there and 64 here (at …); pass --model.lora.alpha 8``, or ``None`` where
        the same tensors compute the same function.
    """
    if theirs is None or ours is None:
        if theirs is ours:
            return None
        there, here = (
            "the whole model is trained (model.lora: null)" if side is None else "an adapter is"
            for side in (theirs, ours)
        )
        return f"{there} there and {here} here; pass the same model.lora"
    if theirs.keys() != ours.keys():
        at = min(theirs.keys() ^ ours.keys())
        return (
            f"lora.targets and modules_to_save are {_places(theirs)} there and {_places(ours)} "
            f"here (one of them lacks {at}); pass the same"
        )
    return next((d for path in theirs if (d := _at(path, theirs[path], ours[path]))), None)


def _at(path: str, there: Mapping[str, Any], here: Mapping[str, Any]) -> str | None:
    """Describe how two adapters differ in one module."""
    a, b = _meaning(there), _meaning(here)
    if a == b:
        return None
    if "trained" in there or "trained" in here:
        return (
            f"{path} trains {_trained(there)} there and {_trained(here)} here; pass the same "
            "modules_to_save and bias"
        )
    changed = [field for field in _FIELDS if there[field] != here[field]]
    if a["start"] == b["start"] and len(changed) > 1:
        changed = [field for field in changed if field != "init"]
    field = changed[0]
    theirs, ours = _shown(there[field]), _shown(here[field])
    shape = ", which gives tensors of the wrong shape" if field == "r" else ""
    return (
        f"lora.{field} is {theirs} there and {ours} here{shape} (at {path}); "
        f"pass --model.lora.{field} {theirs}"
    )


def _meaning(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that decide a module's function, with α and r as the scale they give."""
    if "trained" in values:
        return dict(values)
    r, alpha = values["r"], values["alpha"]
    return {
        "r": r,
        "scale": alpha / (math.sqrt(r) if values["use_rslora"] else r),
        "use_dora": values["use_dora"],
        "start": values["init"] if values["init"] in SUBTRACTED else None,
        "bias": values["bias"] != "none",
    }


def trained_fingerprint(model: nn.Module) -> str:
    """Return 32 hex digits that name what was trained: the active adapter, or the whole model.

    It hashes exact values, and of an adapter its scales too. Factors whose product is zero change
    nothing and are left out with their scale: every untrained adapter that starts at zero has the
    fingerprint of its base, whatever was drawn.
    """
    name = active_adapter(model)
    digest = xxhash.xxh3_128()
    if name is None:
        for key, parameter in sorted(model.named_parameters(), key=lambda pair: pair[0]):
            _add(digest, key, parameter)
        return digest.hexdigest()
    for path, layer in sorted(adapter_layers(model).items()):
        if name not in layer.adapters:
            continue
        adapter = layer.adapter(name)
        idle: tuple[str, ...] = ()
        if isinstance(layer, LowRankLayer):
            if _is_zero(adapter):
                idle = ("lora_A", "lora_B", *_drawn_magnitude(layer, adapter))
            else:
                meaning = {"scale": adapter.config.scale, "dora": adapter.config.use_dora}
                digest.update(f"{path} {json.dumps(meaning)}".encode())
        for key, parameter in sorted(adapter.named_parameters()):
            if key not in idle:
                _add(digest, f"{path}.{key}", parameter)
    return digest.hexdigest()


def _is_zero(adapter: Adapter) -> bool:
    if adapter.get("start_A") is not None:
        return False
    a_IR, b_RO = adapter.get_parameter("lora_A"), adapter.get_parameter("lora_B")
    if not (a_IR.any() and b_RO.any()):
        return True
    # Two factors that are drawn so that their product is zero, up to rounding.
    drawn = adapter.config.init == "orthogonal"
    return drawn and bool((a_IR @ b_RO).norm() <= 1e-6 * a_IR.norm() * b_RO.norm())


def _drawn_magnitude(layer: LowRankLayer, adapter: Adapter) -> tuple[str, ...]:
    """Return the name of a DoRA magnitude that is the base's but for drawn factors' rounding."""
    magnitude = adapter.get("magnitude")
    if magnitude is None or adapter.config.init != "orthogonal":
        return ()
    return ("magnitude",) if torch.allclose(magnitude, layer.norms(adapter), rtol=1e-6) else ()


def _add(digest: xxhash.xxh3_128, name: str, value: Tensor) -> None:
    value = actual(value).detach()
    digest.update(f"\n{name} {tuple(value.shape)} {value.dtype}".encode())
    for chunk in torch.split(value.reshape(-1), 2**20):
        digest.update(chunk.contiguous().cpu().view(torch.uint8).numpy().tobytes())


def _places(meant: Identity) -> str:
    kinds = sorted({path.rpartition(".")[2] for path in meant})
    more = " …" if len(kinds) > _SHOWN else ""
    return f"{', '.join(kinds[:_SHOWN])}{more} ({len(meant)} modules)"


def _trained(values: Mapping[str, Any]) -> str:
    return " and ".join(values["trained"]) if "trained" in values else "an adapter"


def _shown(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value
