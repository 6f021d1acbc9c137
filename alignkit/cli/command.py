"""Run a command: Lightning's for training, a module's function for each other tool."""

from __future__ import annotations

import importlib
import os
import sys
import time
import traceback
from collections.abc import Sequence

import torch
from jsonargparse import set_parsing_settings
from jsonargparse.typing import register_type

from alignkit.cli.commands import TOOLS
from alignkit.cli.config_option import naming_file
from alignkit.cli.errors import explain
from alignkit.cli.launch import RankFailed, keep_relaunchable
from alignkit.cli.logs import log_unraisable
from alignkit.cli.loss import spell_out_losses
from alignkit.cli.optimizer import spell_out_optimizers
from alignkit.cli.parsers import Parser, tool_parser
from alignkit.cli.settings import check_config_files
from alignkit.cli.stage_class import check_stage
from alignkit.cli.stages import STAGES, fit_arguments
from alignkit.cli.training import AlignCLI
from alignkit.models.checkpoint import policy_base
from alignkit.models.find import find_checkpoint
from alignkit.utils.interrupts import Stopped, stop_on_signals
from alignkit.utils.ranks import is_first_rank, is_lost_connection

__all__ = ["TOOLS", "Parser", "run", "run_tool"]

_OTHER_RANK_SECONDS = 2.0  # time for another rank to report the cause of an error first


def run(arguments: Sequence[str], *, debug: bool = False, alone: bool = True) -> int:
    """Run a command.

    Args:
        arguments: The command and its arguments.
        debug: Show the trace of an error before its line.
        alone: Whether this process was started for the command.

    Returns:
        The exit status; see `alignkit.cli.main`.
    """
    if alone:
        keep_relaunchable()
        sys.path.append(os.getcwd())  # finds a user's own classes in the working folder
        if not debug:
            sys.unraisablehook = log_unraisable
    set_parsing_settings(add_print_completion_argument=False)
    register_type(torch.device)  # some of Lightning's callbacks have one in their defaults
    with stop_on_signals():
        try:
            return _run_command(arguments)
        except Stopped as stop:
            return int(stop.code or 0)
        except RankFailed as failed:
            return failed.status
        except Exception as error:
            if debug:
                traceback.print_exception(error)
            return _report_error(error)


def run_tool(name: str, arguments: Sequence[str]) -> int:
    """Run a tool with its function's arguments as flags, and return the exit status.

    Args:
        name: A key of `TOOLS`.
        arguments: The command line after the tool's name.

    Returns:
        What the module's function ``status`` returns for the result, 0 if it has none.
    """
    module = importlib.import_module(TOOLS[name].place)
    if hasattr(module, "run"):
        return int(module.run(arguments))
    parser = tool_parser(name)
    config = parser.instantiate(parser.parse_args(list(arguments)))
    result = getattr(module, name)(**config.as_dict())
    return int(module.status(result)) if hasattr(module, "status") else 0


def _run_command(arguments: Sequence[str]) -> int:
    if arguments[0] in TOOLS:
        return run_tool(arguments[0], arguments[1:])
    if arguments[0] == "completion":
        arguments = ["--completion", *arguments[1:]]
    elif arguments[0] in STAGES:
        name, *flags = arguments
        check_config_files(flags)
        gpu = torch.cuda.is_available()
        arguments = fit_arguments(name, flags, gpu=gpu, base_of=policy_base, find=find_checkpoint)
        check_stage(name, arguments)
    check_config_files(arguments)
    with naming_file(arguments):
        AlignCLI(spell_out_optimizers(spell_out_losses(arguments)))
    return 0


def _report_error(error: Exception) -> int:
    """Print one line about an error, once if several ranks have it, and return the status."""
    line, status = explain(error)
    rank = os.environ.get("RANK") or os.environ.get("LOCAL_RANK") or "0"
    if not is_first_rank() or is_lost_connection(error):
        # The launcher ends this process when another rank has ended with the same error, or with
        # the error that caused this one.
        time.sleep(_OTHER_RANK_SECONDS)
    of_rank = "" if is_first_rank() else f" (rank {rank})"
    print(f"alignkit: error{of_rank}: {line}", file=sys.stderr)
    return status
