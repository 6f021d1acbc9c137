"""List the commands, and write the help and the version, without importing what they run."""

from __future__ import annotations

from typing import NamedTuple

from alignkit import __version__
from alignkit.cli.near import did_you_mean
from alignkit.cli.stages import STAGES
from alignkit.errors import AlignkitError


class Command(NamedTuple):
    """Hold what the help says about a command, and where it is.

    Example:
        >>> COMMANDS["export"].summary
        'Write a checkpoint for use elsewhere.'

    Attributes:
        summary: What it does, in one sentence.
        place: The module of a tool, which has a function of the command's name and
            ``add_arguments(parser)``, or else ``run(arguments)``, which parses them itself and
            returns the exit status. Empty for what Lightning or another command runs.
    """

    summary: str
    place: str = ""


_GROUPS = {
    "Train": {
        **{name: Command(stage.says) for name, stage in STAGES.items()},
        "fit": Command("Train by a configuration, with every option there is."),
        "validate": Command("Measure a checkpoint on the validation split."),
        "test": Command("Measure a checkpoint on the test split."),
    },
    "Use what you trained": {
        "chat": Command("Talk with models, switching between them.", "alignkit.tools.chat.command"),
        "generate": Command("Answer prompts with a model.", "alignkit.tools.generate.command"),
        "compare": Command("Put several models' answers side by side.", "alignkit.tools.compare"),
        "sample": Command("Draw several answers to each prompt.", "alignkit.tools.sample"),
        "judge": Command("Score and rank the answers of a file.", "alignkit.tools.judge.command"),
        "export": Command("Write a checkpoint for use elsewhere.", "alignkit.tools.export"),
    },
    "Look closer": {
        "report": Command("Draw and sum up what runs have logged.", "alignkit.tools.report"),
        "audit": Command("Report every defect of a data set.", "alignkit.tools.audit.command"),
        "plan": Command("Size a fit before it runs.", "alignkit.tools.plan.command"),
        "profile": Command("Time LoRA against full training.", "alignkit.tools.profile.command"),
    },
    "Begin": {
        "demo": Command("Run the stages on a small model, offline.", "alignkit.tools.demo.run"),
        "configs": Command("List the configurations that come along.", "alignkit.tools.configs"),
        "completion": Command("Print a script that completes commands and flags in a shell."),
    },
}
COMMANDS = {name: command for group in _GROUPS.values() for name, command in group.items()}
"""Every command by its name."""
TOOLS = {name: command for name, command in COMMANDS.items() if command.place}
"""The commands that run the function of a module, which is imported when the command runs."""

_USAGE = "usage: alignkit COMMAND [options]"
_PURPOSE = "Align a causal language model in three stages: LoRA, SFT and DPO."
_EXAMPLES = """\
Examples:
  alignkit demo
  alignkit dpo --base HuggingFaceTB/SmolLM2-135M-Instruct --data pairs.jsonl
  alignkit chat runs/dpo
"""
_OPTIONS = {
    "--help": "Show this, or a command's options after the command.",
    "--version": "Show the version.",
    "--quiet": "Show results, warnings and errors alone.",
    "--debug": "Show the trace of an error, before its one line.",
}


def help_text() -> str:
    """Return what ``alignkit --help`` prints."""
    told = {
        **{
            title: {name: command.summary for name, command in group.items()}
            for title, group in _GROUPS.items()
        },
        "Options": _OPTIONS,
    }
    lists = "\n".join(
        f"{title}:\n" + "".join(f"    {name:12}{says}\n" for name, says in group.items())
        for title, group in told.items()
    )
    return f"{_USAGE}\n\n{_PURPOSE}\n\n{lists}\n{_EXAMPLES}"


def version_text() -> str:
    """Return what ``alignkit --version`` prints."""
    return f"alignkit {__version__}"


def unknown_command(name: str) -> AlignkitError:
    """Return the error about a command that does not exist, with the nearest that does."""
    if not name:
        return AlignkitError("give a subcommand; alignkit --help lists them")
    return AlignkitError(
        f"{name}: no such command{did_you_mean(name, COMMANDS)}; see alignkit --help"
    )
