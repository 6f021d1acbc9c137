"""Write the script with which a shell completes commands, flags and their values.

jsonargparse writes one by way of shtab, but that has close to a megabyte, which a shell reads at
every start, and knows nothing of the options of the classes that ``--model`` and ``--data`` name.
"""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from typing import Any

from alignkit.cli.commands import COMMANDS
from alignkit.errors import AlignkitError

SHELLS = ("bash", "zsh")
Flags = Mapping[str, Sequence[str]]
"""From each flag of a command to the values that it may have, none if they are not a few."""

_SCRIPT = """\
# Completes `alignkit`. Add to ~/.{shell}rc:  source <(alignkit completion {shell})
{start}_alignkit() {{
  local current="${{COMP_WORDS[COMP_CWORD]}}" words=""
  if (( COMP_CWORD == 1 )); then
    COMPREPLY=($(compgen -W "{commands}" -- "$current"))
    return
  fi
  case "${{COMP_WORDS[1]}} ${{COMP_WORDS[COMP_CWORD-1]}}" in
{values}
  esac
  if [[ -z "$words" && "$current" == -* ]]; then
    case "${{COMP_WORDS[1]}}" in
{flags}
    esac
  fi
  if [[ -n "$words" ]]; then
    COMPREPLY=($(compgen -W "$words" -- "$current"))
  else
    COMPREPLY=($(compgen -f -- "$current"))
  fi
}}
complete -o filenames -F _alignkit alignkit
"""


def check_shell(arguments: Sequence[str]) -> str:
    """Return the shell that ``alignkit completion`` was asked for.

    Raises:
        AlignkitError: It is none that a script can be written for.
    """
    if len(arguments) != 1 or arguments[0] not in SHELLS:
        given = " ".join(arguments) or "nothing"
        raise AlignkitError(f"completion: got {given}; give one of {', '.join(SHELLS)}")
    return arguments[0]


def completion_script(shell: str, flags: Mapping[str, Flags]) -> str:
    """Return the script for a shell.

    Args:
        shell: One of `SHELLS`.
        flags: The flags of each command.
    """
    return _SCRIPT.format(
        shell=shell,
        start="autoload -U +X bashcompinit && bashcompinit\n" if shell == "zsh" else "",
        commands=" ".join([*COMMANDS, "--help", "--version"]),
        values="\n".join(
            f'    "{command} {flag}") words="{" ".join(values)}" ;;'
            for command, known in {**flags, "completion": {"completion": SHELLS}}.items()
            for flag, values in known.items()
            if values
        ),
        flags="\n".join(
            f'      {command}) words="{" ".join(known)}" ;;' for command, known in flags.items()
        ),
    )


def flags_of(parser: ArgumentParser, values: Flags | None = None) -> dict[str, Sequence[str]]:
    """Return a parser's flags with the few values that they may have.

    Args:
        parser: The parser of a command.
        values: Values of flags whose action does not list them.
    """
    known = {**(values or {})}
    return {
        option: known.get(option) or _choices(action)
        for action in parser._actions
        for option in action.option_strings
        if not option.endswith("+")
    }


def _choices(action: Any) -> Sequence[str]:
    return [str(choice) for choice in action.choices or ()]
