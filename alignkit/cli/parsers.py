"""Parse the arguments of commands, and print help that begins with what users set."""

from __future__ import annotations

import re
from argparse import SUPPRESS, Action
from collections.abc import Iterator, Sequence
from importlib import import_module
from inspect import isabstract
from typing import Any

from jsonargparse import ArgumentParser, DefaultHelpFormatter
from lightning.pytorch.cli import LightningArgumentParser

from alignkit.cli.commands import TOOLS
from alignkit.cli.completion import completion_script, flags_of
from alignkit.cli.messages import OneLineErrors
from alignkit.cli.named import named_class, subclasses
from alignkit.cli.stages import STAGES, stage_parser
from alignkit.data import AlignmentDataModule
from alignkit.modules import AlignmentModule
from alignkit.objectives.preference import PreferenceLoss

_CLASS_PATH = re.compile(r"\b(?:[a-z_]\w*\.)+([A-Z]\w+)")
_SUBCLASSES = re.compile(r", known subclasses: ([\w, ]+)")
_MOST_LISTED = 30
_TRAINER = "trainer"
PARTS: dict[str, type] = {"model": AlignmentModule, "data": AlignmentDataModule}
"""What the class of each part of a configuration is below."""


class _Ignored(Action):
    """List a flag in ``--help`` that `alignkit.cli.main` removes before a parser sees it."""

    def __init__(self, option_strings: Sequence[str], dest: str, **kwargs: Any) -> None:
        super().__init__(option_strings, SUPPRESS, nargs=0, default=SUPPRESS, help=kwargs["help"])

    def __call__(self, *args: Any) -> None:
        """Do nothing."""


class _ShortNames(DefaultHelpFormatter):
    """Write the classes in a help text as one may name them, without their modules."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        text = _CLASS_PATH.sub(r"\1", text)
        listed = _SUBCLASSES.search(text)
        if listed and listed[1].count(",") > _MOST_LISTED:
            text = text[: listed.start()] + text[listed.end() :]
        return super()._split_lines(text, width)


class Parser(OneLineErrors, ArgumentParser):
    """Parse the arguments of a tool."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})


class TrainingParser(OneLineErrors, LightningArgumentParser):
    """Parse the arguments of ``fit``, ``validate`` and ``test``.

    Attributes:
        command: The command, if this parser is that of one.
    """

    command = ""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        chosen = {"allow_abbrev": False, "formatter_class": _ShortNames, **kwargs}
        super().__init__(*args, **chosen)

    def format_help(self, *args: Any) -> str:
        """Return the help: first the model's and data's options, then the run's and trainer's.

        The options are those of the classes that the command line names, or those that every class
        has.
        """
        if not self.command:
            return str(super().format_help(*args))
        groups, usage = self._action_groups, self.usage
        self.usage = f"alignkit {self.command} --model CLASS --data CLASS [--config FILE] [options]"
        self._action_groups = [g for g in groups if g.title and not _is_of(g, "model", "data")]
        self._action_groups.sort(key=lambda group: _is_of(group, _TRAINER))
        try:
            told = str(super().format_help(*args))
        finally:
            self._action_groups, self.usage = groups, usage
        top, options, rest = told.partition("\noptions:\n")
        return f"{top}\n{''.join(self._class_sections())}{options.lstrip()}{rest}"

    def known_options(self) -> Iterator[str]:
        """Yield the options of this parser and of the classes that the command line names."""
        yield from (action.dest for action in self._actions)
        for part, kind in self._named_classes():
            yield from (action.dest for action in options_of(part, kind)._actions)

    def flags(self) -> dict[str, Sequence[str]]:
        """Return the flags of the command for every class, with the few values of each."""
        named = {
            f"--{part}": [kind.__name__ for kind in subclasses(base) if not isabstract(kind)]
            for part, base in {**PARTS, "model.loss": PreferenceLoss}.items()
        }
        found = flags_of(self, named)
        for part, base in PARTS.items():
            for kind in subclasses(base):
                found |= flags_of(options_of(part, kind), named)
        return found

    def _named_classes(self) -> Iterator[tuple[str, type]]:
        if self.command:
            given: Sequence[str] = getattr(self, "args", None) or []
            for part, base in PARTS.items():
                yield part, named_class(given, part, base)

    def _class_sections(self) -> Iterator[str]:
        for part, kind in self._named_classes():
            parser = options_of(part, kind)
            groups = [g for g in parser._action_groups if _is_of(g, part)]
            for group in groups:
                group._group_actions = [a for a in group._group_actions if a.dest != part]
            groups[0].title = part
            groups[0].description = f"--{part} {kind.__name__} has these options:"
            if kind is PARTS[part]:
                groups[
                    0
                ].description = (
                    f"Every --{part} CLASS has these; --{part} CLASS --help shows its own as well:"
                )
            parser._action_groups = groups
            yield f"{parser.format_help().strip()}\n\n"


class PrintCompletion(Action):
    """Print the completion script of a shell and exit, as ``--print_config`` does."""

    def __init__(self, option_strings: Sequence[str], dest: str, **kwargs: Any) -> None:
        super().__init__(option_strings, SUPPRESS, default=SUPPRESS, help=SUPPRESS, **kwargs)

    def __call__(self, parser: Any, namespace: Any, shell: Any, *args: Any) -> None:
        """Print the script."""
        training: dict[str, TrainingParser] = parser._subcommands_action.choices
        flags = {name: each.flags() for name, each in training.items()}
        for name, tool in TOOLS.items():
            own = not hasattr(import_module(tool.place), "run")
            flags[name] = flags_of(tool_parser(name)) if own else flags["fit"]
        flags |= {name: flags_of(stage_parser(name)) for name in STAGES}
        print(completion_script(shell, flags), end="")
        parser.exit()


def tool_parser(name: str) -> Parser:
    """Return the parser of a tool."""
    parser = Parser(prog=f"alignkit {name}", description=TOOLS[name].summary)
    add_common_flags(parser)
    import_module(TOOLS[name].place).add_arguments(parser)
    return parser


def add_common_flags(parser: ArgumentParser) -> None:
    """List the flags that every command has."""
    parser.add_argument(
        "--debug", action=_Ignored, help="Show the trace of an error, before its one line."
    )
    parser.add_argument("--quiet", action=_Ignored, help="Show results, warnings and errors alone.")


def options_of(part: str, kind: type) -> ArgumentParser:
    """Return a parser of the options of a class, as ``model.…`` or ``data.…``."""
    parser = ArgumentParser(usage=SUPPRESS, add_help=False, formatter_class=_ShortNames)
    skip: set[str | int] = {"tokenizer"} if part == "data" else set()  # linked to the model's
    parser.add_class_arguments(kind, part, skip=skip, fail_untyped=False)
    return parser


def _is_of(group: Any, *parts: str) -> bool:
    """Tell whether a group holds the options of one of the parts of a configuration."""
    return any(
        action.dest in parts or action.dest.startswith(tuple(f"{part}." for part in parts))
        for action in group._group_actions
    )
