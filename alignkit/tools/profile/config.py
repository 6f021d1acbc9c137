"""Read the settings of ``alignkit profile`` from a training configuration."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from alignkit.errors import AlignkitError
from alignkit.lora import LoRAConfig


def read_training_config(path: str) -> dict[str, Any]:
    """Return the parts of a training configuration that decide what a step costs.

    Args:
        path: A YAML file that ``alignkit fit --config`` takes.

    Returns:
        ``base``, ``lora``, ``random_init``, ``precision`` and ``tokens`` (the data's
        ``block_size``), each only if the file sets it.

    Raises:
        AlignkitError: The file cannot be read, trains without LoRA, or is no such configuration.
    """
    content = _load(path)
    model = _arguments(content, "model", path)
    found = {key: model[key] for key in ("base", "random_init") if key in model}
    if model.get("lora", "auto") != "auto":
        if not isinstance(model["lora"], Mapping):
            raise AlignkitError(
                f"config '{path}': model.lora is {model['lora']!r}; set the adapter to compare with"
            )
        found["lora"] = LoRAConfig.from_dict(model["lora"])
    precision = _mapping(content.get("trainer"), "trainer", path).get("precision")
    if precision is not None:
        found["precision"] = str(precision)
    block_size = _arguments(content, "data", path).get("block_size")
    if block_size is not None:
        found["tokens"] = block_size
    return found


def _load(path: str) -> Mapping[str, Any]:
    try:
        content = yaml.safe_load(Path(path).expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise AlignkitError(
            f"config '{path}': {error.strerror}; pass a YAML that fit takes"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise AlignkitError(
            f"config '{path}{line}': is no YAML; pass one that fit takes"
        ) from error
    return _mapping(content, "the file", path)


def _arguments(content: Mapping[str, Any], key: str, path: str) -> Mapping[str, Any]:
    return _mapping(_mapping(content.get(key), key, path).get("init_args"), key, path)


def _mapping(value: Any, what: str, path: str) -> Mapping[str, Any]:
    if value is not None and not isinstance(value, Mapping):
        raise AlignkitError(f"config '{path}': {what} holds no keys; pass a YAML that fit takes")
    return value or {}
