"""Refuse a loss that does not belong to the module it is given to, in one line.

`KTOModule` and `RewardModule` have one loss each, whose parameters are given directly. A
configuration of DPO names a loss by its class, which ``--model KTOModule`` behind it does not take
back.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from alignkit.cli.config_file import flags_and_values
from alignkit.cli.named import named_class
from alignkit.errors import AlignkitError
from alignkit.modules import AlignmentModule
from alignkit.objectives.preference import PreferenceLoss


def check_losses(arguments: Sequence[str], configs: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse a loss of a configuration or flag that the run's module does not take.

    Args:
        arguments: The command line after ``alignkit``.
        configs: The content of each configuration file, by its path.

    Raises:
        AlignkitError: The loss belongs to another module.
    """
    module = named_class(arguments, "model", AlignmentModule)
    own = _loss_of(module)
    if own is None:
        _refuse_any(module, configs)
        return
    for path, content in configs.items():
        written_for = named_class(["--config", path], "model", AlignmentModule)
        stray = _stray(_loss_in(content), own, _loss_of(written_for))
        if stray:
            raise AlignkitError(
                f"{path}: model.loss is {stray}, which {module.__name__} does not take; remove "
                f"`loss` from the file, and give {_instead(own)}"
            )
    for name in _given(arguments, "--model.loss"):
        if not issubclass(own, PreferenceLoss) and name.isidentifier() and name != own.__name__:
            raise AlignkitError(
                f"--model.loss {name}: {module.__name__} has a loss of its own; remove the option, "
                f"and give {_instead(own)}"
            )


def _refuse_any(module: type, configs: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse a file's loss for a module that takes none, which the parser would drop."""
    takes = inspect.signature(module).parameters
    passes_on = any(each.kind is each.VAR_KEYWORD for each in takes.values())
    if module is AlignmentModule or "loss" in takes or passes_on:
        return
    for path, content in configs.items():
        if _loss_in(content) is not None:
            raise AlignkitError(
                f"{path}: model.loss: {module.__name__} takes none; remove `loss` from the file"
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


def _loss_of(module: type) -> type | None:
    """Return the class of a module's default loss, ``None`` if it names none."""
    named = inspect.signature(module).parameters.get("loss")
    return type(named.default) if named is not None and is_dataclass(named.default) else None


def _loss_in(content: Any) -> Any:
    """Return a configuration's loss as it is written, ``None`` if there is none."""
    for name in ("model", "init_args", "loss"):
        content = content.get(name) if isinstance(content, Mapping) else None
    return content


def _given(arguments: Sequence[str], flag: str) -> list[str]:
    """Return the values that a flag was given."""
    return [value for name, value in flags_and_values(arguments) if name == flag]


def _short(name: str) -> str:
    return name.rpartition(".")[2]
