"""Shorten a parser's error messages to one line.

jsonargparse names every type that it tried, and prints the whole value.
"""

from __future__ import annotations

import difflib
import re
import typing
from argparse import Action
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from alignkit.cli.loss import unknown_loss_in
from alignkit.cli.near import did_you_mean
from alignkit.errors import AlignkitError, find_user_error

# Lines that only list the types that were tried, or show the whole value.
_NOISE = (
    "Does not validate",
    "Subtypes:",
    "Errors:",
    "Given value",
    "Not a valid subclass of",
    "Subclass types expect one of",
    "a class path (str)",
    "a dict with",
    "Expected a path but",
)
_KEY = re.compile(r'^Parser key "(?P<key>.*?)":\s*')
_NESTED = re.compile(r"Given value: NestedArg\(key='(?P<key>[^']*)'")
_PLAIN_VALUE = re.compile(r"Given value type: <class '(?:str|int|float|bool)'>\s*Given value: (.*)")
_UNKNOWN = re.compile(r"(?:Option|does not accept option) '(?P<name>[^']+)'")
_TYPE = re.compile(r"^Expected an? (?P<what>.*?)(?:\. Got value: (?P<value>.*))?$")
_NO_CLASS = re.compile(r"^Expected a dot import path string: (?P<name>\S+)$")
_PROBLEM = re.compile(r"Problem with given class_path '(?P<path>[^']+)':\s*")
_REQUIRED = re.compile(r"the following arguments are required: (.*)")
_GIVE = "give "
_NO_OPTION = "no such option"
_NOT_ADDED = "nothing can be added to it; give the whole list: '[…, …]'"
_DUMP = re.compile(r"\s*\S*(?:Namespace|NestedArg)\(.*", re.DOTALL)


@dataclass
class OptionError(AlignkitError):
    """Report an option that a parser refuses; an outer parser puts its own name before it.

    Example:
        >>> str(OptionError("lr", "expected float, got 'x'", "alignkit fit"))
        "lr: expected float, got 'x'; see alignkit fit --help"

    Args:
        option: The option as one would write it after ``--``; empty if no single one is wrong.
        complaint: What is wrong with it.
        command: The command whose ``--help`` explains it.
    """

    option: str
    complaint: str
    command: str

    def __str__(self) -> str:
        where = f"{self.option}: " if self.option else ""
        return f"{where}{self.complaint}; see {self.command} --help"


class OneLineErrors:
    """Make a parser raise an `AlignkitError` of one line, without its usage."""

    prog: str
    _actions: list[Action]

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise jsonargparse's message without the types that it tried.

        Raises:
            AlignkitError: Always.
        """
        cause = find_user_error(ex) or unknown_loss_in(message)
        if cause is not None and not isinstance(cause, OptionError):
            raise cause from None
        found = _KEY.match(message)
        option = found["key"] if found else ""
        message = message[found.end() if found else 0 :]
        lacking = _REQUIRED.match(message)
        if lacking:
            option, message = "", self._needed(lacking[1].split(", "), option)
        if cause is not None:
            complaint = cause.complaint
            nested = _NESTED.search(message)
            place = [option, nested["key"] if nested else ""]
            if not f".{place[-1]}".endswith(f".{cause.option}"):  # one of the value's own
                place.append(cause.option)
            option = ".".join(filter(None, place))
            if complaint.startswith(_GIVE):  # an argument of the class that the option names
                option, complaint = "", complaint.replace("--", f"--{option}.")
            if complaint == _NO_OPTION and option in set(self.known_options()):
                complaint += f"; give --{option.partition('.')[0]} CLASS before it"
        else:
            complaint = plain(message)
            unknown = _UNKNOWN.search(complaint)
            if unknown and not option:
                option, complaint = unknown["name"], _NO_OPTION
            complaint += self._suggestion(message, option)
        listed, added, inner = option.partition("+")
        is_known = bool(inner) or listed in set(self.known_options())
        if added and is_known and complaint.startswith((_NO_OPTION, _NOT_ADDED)):
            option, complaint = listed, _NOT_ADDED
        command = self.prog.replace(" [options]", "")
        raise OptionError(option, complaint, command) from None

    def _needed(self, names: Sequence[str], part: str) -> str:
        """Return what is missing as one gives it: a flag by its name, an argument in capitals."""
        positional = {action.dest for action in self._actions if not action.option_strings}
        commands = tuple(f"{parser.command}." for parser in _subparsers(self))
        flags = [
            name.upper()
            if name in positional
            else "--" + ".".join(filter(None, [part, name.removeprefix(_first(name, commands))]))
            for name in sorted(names, key=lambda name: name not in positional)
        ]
        file = ", or a --config FILE that has both" if names[0].startswith(commands) else ""
        return f"{_GIVE}{' and '.join(flags)}{file}"

    def _suggestion(self, message: str, option: str) -> str:
        """Return ``; did you mean …?`` about an unknown option, command or class."""
        missing = _missing_class(complaints(message))
        if missing:
            hints = [a.__dict__.get("_typehint") for a in self._actions if a.dest == option]
            return did_you_mean(missing, set().union(*map(_class_names, hints)))
        stray = re.match(r"unrecognized arguments: --([^\s=]+)", message)
        unknown = stray[1] if stray else option if _UNKNOWN.search(message) else ""
        parsers = [self, *_subparsers(self)]
        known = {option for parser in parsers for option in parser.known_options()}
        return did_you_mean(unknown, known) or _full_name(unknown, known)

    def known_options(self) -> Iterable[str]:
        """Return the options to look for the nearest in."""
        return (action.dest for action in self._actions)


def plain(message: str) -> str:
    """Return a parser's message as one line: the likeliest complaint and a short value.

    The types that were tried and the dumps of whole configurations are left out.
    """
    found = complaints(message)
    missing = _missing_class(found)
    if missing:
        return f"no class {missing!r}; give a name or package.module.Class"
    given = _PLAIN_VALUE.search(message)
    expected = [_TYPE.match(line) for line in found]
    if not found or not all(expected):
        said = "; ".join(found) or "not understood"
        who = repr(given[1]) if given else "it"
        return said.replace("Import path does not correspond to a", f"{who} names no").rstrip(".")
    value = next((m["value"] for m in expected if m and m["value"]), None)
    value = value if value is not None else given[1] if given else None
    wanted = [kind for m in expected if m for kind in _type_names(m["what"])]
    said = f"expected {' or '.join(dict.fromkeys(wanted))}"
    return said if value is None or _DUMP.search(value) else f"{said}, got {value!r}"


def complaints(message: str) -> list[str]:
    """Return the most specific complaints of a message, without the types that were tried."""
    kept: list[str] = []
    telling = True  # whether a continued line belongs to a complaint that is kept
    for line in map(str.strip, _PROBLEM.sub(r"\g<path>: ", message).splitlines()):
        bare = _DUMP.sub("", line.removeprefix("- "))
        if bare.startswith(_NOISE):
            telling = False
        elif line.startswith("- ") or not kept:
            telling = True
            kept += [bare] if bare else []
        elif bare and telling:
            kept[-1] += f" {bare}"
    refused = [line for line in kept if not _TYPE.match(line)]
    nameless = [line for line in kept if (m := _NO_CLASS.match(line)) and _is_class(m["name"])]
    attempts = [line for line in kept if not _NO_CLASS.match(line)]
    return list(dict.fromkeys(refused or nameless[:1] or attempts or kept))


def _full_name(name: str, known: Iterable[str]) -> str:
    """Return ``; did you mean …?`` with the option that is called so within a part."""
    shorts: dict[str, str] = {}
    for each in sorted(known, key=lambda option: (option.startswith("trainer."), option)):
        shorts.setdefault(each.rpartition(".")[2], each)
    close = difflib.get_close_matches(name, shorts, n=1, cutoff=0.8)
    return f"; did you mean {shorts[close[0]]}?" if name and close else ""


def _missing_class(found: Sequence[str]) -> str:
    """Return the class that could not be found, empty if the complaints are about more."""
    names = [m["name"] for line in found if (m := _NO_CLASS.match(line))]
    return names[0] if names and len(names) == len(found) else ""


def _is_class(name: str) -> bool:
    return "." in name or name[:1].isupper()


def _type_names(what: str) -> list[str]:
    literal = re.match(r"typing\.Literal\[(.*)\]$", what)
    if literal:
        return [choice.strip().strip("'\"") for choice in literal[1].split(",")]
    name = re.sub(r"<class '(?:.*\.)?(\w+)'>", r"\1", what)
    return [{"NoneType": "null"}.get(name, name)]


def _class_names(hint: Any) -> set[str]:
    """Return the names of the imported classes that a type hint allows."""
    if isinstance(hint, type) and hint.__module__ != "builtins":
        below: list[type] = type.__subclasses__(hint)
        return {hint.__name__}.union(*map(_class_names, below))
    parts: Sequence[Any] = hint if isinstance(hint, list) else typing.get_args(hint)
    return set().union(*map(_class_names, parts))


def _subparsers(parser: Any) -> list[Any]:
    listed = getattr(parser, "_subcommands_action", None)
    return list(listed.choices.values()) if listed else []


def _first(name: str, starts: Sequence[str]) -> str:
    return next((start for start in starts if name.startswith(start)), "")
