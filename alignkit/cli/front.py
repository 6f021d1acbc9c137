"""Handle what needs no library at once, and hand the rest to the command."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from alignkit.cli.commands import COMMANDS, help_text, unknown_command, version_text
from alignkit.cli.completion import check_shell
from alignkit.cli.logs import configure_logs
from alignkit.cli.stages import STAGES, stage_help
from alignkit.cli.streams import survive_closed_streams
from alignkit.errors import AlignkitError
from alignkit.utils.phases import phase
from alignkit.utils.ranks import check_rank_variables


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line.

    Help, the version and mistaken commands are answered before torch is imported, which takes
    seconds.

    Args:
        args: What follows ``alignkit``; the process's own arguments by default.

    Returns:
        The exit status: 0 if what was asked for was done; 2 after one line on standard error
        about something to change, 1 about anything else; 128 and a signal's number where one has
        stopped it. With ``--debug`` the trace comes before the line.
    """
    if args is None:
        survive_closed_streams()
    given = list(sys.argv[1:] if args is None else args)
    arguments = [argument for argument in given if argument not in ("--debug", "--quiet")]
    try:
        told = _answer_at_once(arguments)
        if told is None:
            check_rank_variables()
    except AlignkitError as error:
        print(f"alignkit: error: {error}", file=sys.stderr)
        return 2
    if told is not None:
        print(told)
        return 0
    quiet = "--quiet" in given
    configure_logs(quiet)
    with phase("loading libraries"):
        from alignkit.cli.command import run
    configure_logs(quiet)  # Lightning has set levels of its own meanwhile
    return run(arguments, debug="--debug" in given, alone=args is None)


def _answer_at_once(arguments: Sequence[str]) -> str | None:
    """Return what needs no library, ``None`` if the command has to run.

    Raises:
        AlignkitError: There is no command, or none of that name.
    """
    first, *rest = arguments or [""]
    if first in ("--help", "-h"):
        return help_text()
    if first == "--version":
        return version_text()
    if first in STAGES and {"--help", "-h"}.intersection(rest):
        return stage_help(first)
    if first == "completion" and rest not in (["--help"], ["-h"]):
        check_shell(rest)
    if first.startswith("-") or first in COMMANDS:
        return None
    raise unknown_command(first)
