"""Find the class that a command line names for a part of the configuration."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path

import yaml


def named_class(arguments: Sequence[str], part: str, base: type) -> type:
    """Return the class that ``--model`` or ``--data`` names, or that a configuration does.

    Args:
        arguments: The arguments of a training command.
        part: ``model`` or ``data``.
        base: The class to return if none is named or the one named is none below it.
    """
    found = base
    for flag, value in zip(arguments, [*arguments[1:], ""], strict=False):
        name, given, inline = flag.partition("=")
        value = inline if given else value
        if name == f"--{part}":
            found = _find(value, base)
        elif name in ("--config", "-c"):
            found = _find(_configured(value, part), base)
    return found


def subclasses(kind: type) -> Iterator[type]:
    """Yield the imported classes below a class."""
    below: list[type] = type.__subclasses__(kind)
    for each in below:
        yield each
        yield from subclasses(each)


def _find(name: str, base: type) -> type:
    module, _, attribute = name.rpartition(".")
    try:
        found = getattr(import_module(module), attribute) if module else None
    except Exception:  # a user's file may raise anything; the parser reports what is wrong
        found = None
    known = {kind.__name__: kind for kind in subclasses(base)}
    found = found or known.get(name)
    return found if isinstance(found, type) and issubclass(found, base) else base


def _configured(path: str, part: str) -> str:
    """Return the class path of a part in a configuration file, empty if it cannot be read."""
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        return str(content[part]["class_path"])
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError):
        return ""
