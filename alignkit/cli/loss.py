"""Give a loss that is named on the command line or in a file the default parameters of its class.

Where a new class replaces another, the parser keeps the values of the parameters that both have:
SimPO in the place of the default, DPO, would silently run at DPO's β.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, fields
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml

from alignkit.cli.config_file import named_configs, read_config_file
from alignkit.cli.near import did_you_mean
from alignkit.errors import AlignkitError
from alignkit.objectives.preference import PreferenceLoss, known_losses, unknown_loss
from alignkit.objectives.values import has_fields

_FLAG = "--model.loss"
# The parser's message about a name that is no known class.
_NO_CLASS = re.compile(r'key "(?:\S+\.)?loss".*?import path string: (\S+)', re.DOTALL)


def spell_out_losses(arguments: Sequence[str]) -> list[str]:
    """Return the arguments with all parameters of each loss, those of the losses inside as well.

    A loss may be named by ``--model.loss``, by a parameter of it such as ``--model.loss.of``, and
    by a configuration file, after which a flag repeats it.
    """
    spelled: list[str] = []
    arguments = [_without_class_path(argument) for argument in arguments]
    for previous, argument in zip(["", *arguments], arguments, strict=False):
        name, equals, value = argument.partition("=")
        inline = bool(equals) and name.startswith("-")
        flag, given = (name, value) if inline else (previous, argument)
        told = _spelled_value(flag, given)
        spelled.append(f"{flag}={told}" if inline else told)
        spelled += _losses_of_file(flag, given)
    return spelled


def unknown_loss_in(message: str) -> AlignkitError | None:
    """Return the error about an unknown loss, ``None`` if a message is not about one."""
    found = _NO_CLASS.search(message)
    return unknown_loss(found[1]) if found else None


def _without_class_path(argument: str) -> str:
    """Return ``--model.loss`` for ``--model.loss.class_path``, which say the same."""
    name, equals, value = argument.partition("=")
    return name.removesuffix(".class_path") + equals + value if name.startswith(_FLAG) else argument


def _spelled_value(flag: str, value: str) -> str:
    """Return a flag's value; a loss as JSON with all of its parameters."""
    if not f"{flag}.".startswith(f"{_FLAG}.") or flag.endswith(".help"):
        return value
    try:
        given = yaml.safe_load(value)
    except yaml.YAMLError:  # the parser reports it
        return value
    spelled = _spelled(given, flag.removeprefix("--"))
    return value if spelled == given else json.dumps(spelled)


def _losses_of_file(flag: str, value: str) -> Iterator[str]:
    """Yield the flag that repeats the loss of a file of options, with all of its parameters."""
    for path in _files(flag, value):
        content = read_config_file(path)
        options = content if flag == "--model" else content.get("model")
        given = options.get("init_args") if isinstance(options, Mapping) else None
        loss = given.get("loss") if isinstance(given, Mapping) else None
        if (spelled := _spelled(loss, _FLAG.removeprefix("--"))) != loss:
            yield f"{_FLAG}={json.dumps(spelled)}"


def _files(flag: str, value: str) -> Iterator[Path]:
    if flag == "--model" and Path(value).is_file():
        yield Path(value)
    yield from named_configs(flag, value)


def _spelled(given: Any, place: str) -> Any:
    """Return a loss by name or by class and parameters with the defaults of its class.

    What is no loss, or one whose parameters are not known, stays; a list has each spelled out.

    Raises:
        AlignkitError: A parameter that the class has not. The parser would not say of which loss.
    """
    if isinstance(given, list):
        return [_spelled(each, place) for each in given]
    named = {"class_path": given} if isinstance(given, str) else given
    if not isinstance(named, Mapping) or not isinstance(named.get("class_path"), str):
        return given
    kind = _class_of(named["class_path"])
    if kind is None or not has_fields(kind):
        return given
    init_args = named.get("init_args")
    values = dict(init_args) if isinstance(init_args, Mapping) else {}
    known = {field.name for field in fields(kind) if field.init}
    if unknown := next((str(name) for name in values if name not in known), None):
        near = did_you_mean(unknown, known)
        raise AlignkitError(f"{place}.{unknown}: no such option of {kind.__name__}{near}")
    for field in fields(kind):
        if field.name in values:
            if PreferenceLoss.__name__ in str(field.type):
                values[field.name] = _spelled(values[field.name], f"{place}.{field.name}")
        elif field.init and field.default is not MISSING:
            plain = field.default
            values[field.name] = plain.to_dict() if isinstance(plain, PreferenceLoss) else plain
    return {**named, "init_args": values} if values else given


def _class_of(name: str) -> type | None:
    """Return the loss of a name or an import path, ``None`` where there is none."""
    kind = {known.__name__: known for known in known_losses()}.get(name)
    if kind is None:
        module, _, attribute = name.rpartition(".")
        try:
            kind = getattr(import_module(module), attribute)
        except Exception:  # a user's file may raise anything; the parser reports what is wrong
            return None
    return kind if isinstance(kind, type) and issubclass(kind, PreferenceLoss) else None
