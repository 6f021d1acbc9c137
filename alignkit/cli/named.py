"""Find the class that a command line names for a part of the configuration."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from alignkit.cli.config_file import flags_and_values, named_configs, read_config_file
from alignkit.errors import AlignkitError


def named_class(arguments: Sequence[str], part: str, base: type) -> type:
    """Return the class that ``--model`` or ``--data`` names, or that a configuration does.

    Args:
        arguments: The arguments of a training command.
        part: ``model`` or ``data``.
        base: The class to return if none is named or the one named is none below it.
    """
    found = base
    for flag, value in flags_and_values(arguments):
        if flag == f"--{part}":
            found = _find(value, base)
        for path in named_configs(flag, value):
            named = _configured(path, part)
            found = _find(named, base) if named else found
    return found


def subclasses(kind: type) -> list[type]:
    """Return the imported classes below a class, each once."""
    below: list[type] = type.__subclasses__(kind)
    return list(dict.fromkeys(each for one in below for each in (one, *subclasses(one))))


def _find(name: str, base: type) -> type:
    module, _, attribute = name.rpartition(".")
    try:
        found = getattr(import_module(module), attribute) if module else None
    except Exception:  # a user's file may raise anything; the parser reports what is wrong
        found = None
    known = {kind.__name__: kind for kind in subclasses(base)}
    found = found or known.get(name)
    return found if isinstance(found, type) and issubclass(found, base) else base


def _configured(path: Path, part: str) -> str:
    """Return the class path of a part in a configuration file, empty if it cannot be read."""
    try:
        return str(read_config_file(path)[part]["class_path"])
    except (AlignkitError, KeyError, TypeError):
        return ""
