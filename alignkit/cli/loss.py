"""Give ``--model.loss NAME`` on the command line the default parameters of that loss."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, fields, is_dataclass
from importlib import import_module

from alignkit.errors import AlignkitError
from alignkit.objectives.preference import PreferenceLoss, known_losses, unknown_loss

_FLAG = "--model.loss"
# The parser's message about a name that is no known class.
_NO_CLASS = re.compile(r'key "(?:\S+\.)?loss".*?import path string: (\S+)', re.DOTALL)


def spell_out_losses(arguments: Sequence[str]) -> list[str]:
    """Return the arguments with a loss's own defaults added after each ``--model.loss NAME``.

    Where a new class replaces another, the parser keeps the values of the parameters that both
    have: SimPO would silently run at DPO's β.
    """
    fresh: list[str] = []
    for previous, argument in zip(["", *arguments], arguments, strict=False):
        fresh.append(argument)
        if previous == _FLAG:
            fresh += _default_flags(argument)
        elif argument.startswith(f"{_FLAG}="):
            fresh += _default_flags(argument.removeprefix(f"{_FLAG}="))
    return fresh


def unknown_loss_in(message: str) -> AlignkitError | None:
    """Return the error about an unknown loss, ``None`` if a message is not about one."""
    found = _NO_CLASS.search(message)
    return unknown_loss(found[1]) if found else None


def _default_flags(name: str) -> Iterator[str]:
    """Yield the flags that give a loss's parameters the values of its own class."""
    kind = {known.__name__: known for known in known_losses()}.get(name)
    if kind is None:
        module, _, attribute = name.rpartition(".")
        try:
            kind = getattr(import_module(module), attribute)
        except Exception:  # a user's file may raise anything; the parser reports what is wrong
            return
    for field in fields(kind) if is_dataclass(kind) else ():
        if field.init and field.default is not MISSING:
            default = field.default
            plain = default.to_dict() if isinstance(default, PreferenceLoss) else default
            yield f"{_FLAG}.{field.name}={json.dumps(plain)}"
