"""Read the settings of ``alignkit profile`` from a training configuration."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from inspect import signature
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer

from alignkit.cli.config_file import read_config_file
from alignkit.cli.named import named_class
from alignkit.cli.near import did_you_mean
from alignkit.cli.parsers import PARTS, options_of
from alignkit.errors import AlignkitError
from alignkit.lora import LoRAConfig

_TOP = ("seed_everything", "trainer", "model", "data", "ckpt_path", "weights_only")
_CLASS = ("class_path", "init_args")


def read_training_config(path: str) -> dict[str, Any]:
    """Return the parts of a training configuration that decide what a step costs.

    Args:
        path: A YAML file that ``alignkit fit --config`` takes.

    Returns:
        ``base``, ``lora``, ``random_init``, ``precision`` and ``tokens`` (the data's
        ``block_size``), each only if the file sets it.

    Raises:
        AlignkitError: The file cannot be read, trains without LoRA, or has an option that ``fit``
            has not.
    """
    path = str(Path(path).expanduser())
    content = read_config_file(Path(path))
    _refuse_unknown(content, path)
    model = _arguments(content, "model", path)
    found = {key: model[key] for key in ("base", "random_init") if key in model}
    if model.get("lora", "auto") != "auto":
        if not isinstance(model["lora"], Mapping):
            raise AlignkitError(
                f"{path}: model.lora is {model['lora']!r}; set the adapter to compare with"
            )
        found["lora"] = LoRAConfig.from_dict(model["lora"])
    precision = _mapping(content.get("trainer"), "trainer", path).get("precision")
    if precision is not None:
        found["precision"] = str(precision)
    block_size = _arguments(content, "data", path).get("block_size")
    if block_size is not None:
        found["tokens"] = block_size
    return found


def _refuse_unknown(content: Mapping[str, Any], path: str) -> None:
    """Refuse keys that ``fit`` refuses, such as a mistyped one."""
    trainer = signature(Trainer.__init__).parameters
    known: dict[str, Collection[str]] = {"": _TOP, "trainer": trainer}
    given = {"": content, "trainer": _mapping(content.get("trainer"), "trainer", path)}
    for part, base in PARTS.items():
        options = options_of(part, named_class(["--config", path], part, base))
        known[part] = {f"{action.dest}.".split(".")[1] for action in options._actions}
        given[part] = _arguments(content, part, path)
        known[f"{part}."], given[f"{part}."] = _CLASS, content.get(part) or {}
    for part, settings in given.items():
        for name in settings:
            if name not in known[part]:
                where = f"{part.rstrip('.')}.{name}" if part else name
                near = did_you_mean(name, known[part])
                raise AlignkitError(f"{path}: {where}: no such option{near}")


def _arguments(content: Mapping[str, Any], key: str, path: str) -> Mapping[str, Any]:
    return _mapping(_mapping(content.get(key), key, path).get("init_args"), key, path)


def _mapping(value: Any, what: str, path: str) -> Mapping[str, Any]:
    if value is not None and not isinstance(value, Mapping):
        raise AlignkitError(f"{path}: {what} holds no keys; pass a YAML that fit takes")
    return value or {}
