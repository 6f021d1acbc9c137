"""Refuse a loss that does not belong to the module it is given to, in one line.

`KTOModule` and `RewardModule` have one loss each, whose parameters are given directly. A
configuration of DPO names a loss by its class, which ``--model KTOModule`` behind it does not take
back.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from importlib import import_module
from typing import Any

import alignkit
from alignkit.cli.config_file import flags_and_values
from alignkit.errors import AlignkitError
from alignkit.objectives.preference import PreferenceLoss


def check_losses(arguments: Sequence[str], configs: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse a loss of a configuration or flag that the run's module does not take.

    Args:
        arguments: The command line after ``alignkit``.
        configs: The content of each configuration file, by its path.

    Raises:
        AlignkitError: The loss belongs to another module.
    """
    models = {path: _part(content, "model") for path, content in configs.items()}
    named = [*(model.get("class_path") for model in models.values()), *_given(arguments, "--model")]
    module = next((str(name) for name in reversed(named) if name), "")
    own = _loss_of(module)
    if own is None:
        return
    for path, model in models.items():
        settings = model.get("init_args")
        loss = settings.get("loss") if isinstance(settings, Mapping) else None
        stray = _stray(loss, own, _loss_of(str(model.get("class_path") or module)))
        if stray:
            raise AlignkitError(
                f"{path}: model.loss is {stray}, which {_short(module)} does not take; remove "
                f"`loss` from the file, and give {_instead(own)}"
            )
    for name in _given(arguments, "--model.loss"):
        if not issubclass(own, PreferenceLoss) and name.isidentifier() and name != own.__name__:
            raise AlignkitError(
                f"--model.loss {name}: {_short(module)} has a loss of its own; remove the option, "
                f"and give {_instead(own)}"
            )


def _stray(loss: Any, own: type, written_for: type | None) -> str:
    """Return what a file's loss is if the module's own is another kind, else nothing."""
    if loss is None:
        return ""
    name = loss.get("class_path", "") if isinstance(loss, Mapping) else str(loss)
    if issubclass(own, PreferenceLoss):
        other = written_for is not None and not issubclass(written_for, PreferenceLoss)
        return f"that of {written_for.__name__}" if other and not name and written_for else ""
    if name:
        return name if _short(name) != own.__name__ else ""
    strangers = set(loss) - {field.name for field in fields(own)}  # type: ignore[arg-type]
    return f"one with {', '.join(sorted(strangers))}" if strangers else ""


def _instead(own: type) -> str:
    """Return what to give for a module whose loss is of a class."""
    if issubclass(own, PreferenceLoss):
        return "--model.loss NAME"
    return " or ".join(f"--model.loss.{each.name}" for each in fields(own) if each.init)  # type: ignore[arg-type]


def _loss_of(module: str) -> type | None:
    """Return the class of a module's default loss, ``None`` if it has none or is not known."""
    package, _, name = module.rpartition(".")
    try:
        kind = getattr(import_module(package), name) if package else getattr(alignkit, name)
        default = inspect.signature(kind).parameters["loss"].default
    except (ImportError, AttributeError, KeyError, TypeError, ValueError):
        return None  # the parser reports what is wrong
    return type(default) if is_dataclass(default) else None


def _given(arguments: Sequence[str], flag: str) -> list[str]:
    """Return the values that a flag was given."""
    return [value for name, value in flags_and_values(arguments) if name == flag]


def _part(content: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    part = content.get(name)
    return {"class_path": part} if isinstance(part, str) else part if isinstance(part, dict) else {}


def _short(name: str) -> str:
    return name.rpartition(".")[2]
