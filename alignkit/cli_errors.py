"""What a person reads when a command fails: one line, whoever raised it."""

from __future__ import annotations

import difflib
import inspect
import re
from types import TracebackType

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer

from alignkit.cli_loss import unknown_loss_in
from alignkit.errors import AlignkitError

USER, INTERNAL = 2, 1
"""Exit statuses: something the user can mend, or a fault of ours."""

# Lines of the parser's messages that list the types it tried, or dump what it was given.
_NOISE = (
    "Does not validate against any of the Union",
    "Subtypes:",
    "Errors:",
    "Given value",
    "Expected a <class",
    "Expected a typing.",
    "Expected a path but",
    "Expected a collections",
    "Problem with given class_path",
)
_MISTAKES = (MisconfigurationException, ModuleNotFoundError, OSError, ValueError)
# Faults of a program, where they come from our own code.
_FAULTS = (TypeError, AttributeError, LookupError, NameError, AssertionError, ArithmeticError)


def one_line(error: BaseException) -> tuple[str, int]:
    """Return the line that says what went wrong, and the exit status.

    Args:
        error: Whatever a command raised.
    """
    mine = find_user_error(error)
    if mine is not None:
        return str(mine), USER
    text = plain_message(str(error)) or type(error).__name__
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in text:
        return f"out of memory ({text}); lower data.tokens_per_batch, or set " \
            "model.activation_checkpointing true", INTERNAL  # fmt: skip
    if isinstance(error, OSError) and error.strerror:
        place = f"{error.filename}: " if error.filename else ""
        return f"{place}{error.strerror}", USER
    if isinstance(error, _FAULTS) or _raised_here(error.__traceback__):
        told = f"internal error: {type(error).__name__}: {text}"
        return f"{told}; run again with --debug for the trace, and please report it", INTERNAL
    advice = _advice(text)
    return f"{text}{advice}", USER if isinstance(error, _MISTAKES) else INTERNAL


def find_user_error(error: BaseException | None) -> AlignkitError | None:
    """Return the `AlignkitError` behind what others made of it, if there is one."""
    while error is not None and not isinstance(error, AlignkitError):
        error = error.__cause__
    return error


def plain_message(message: str) -> str:
    """Return a library's message as one line, without the types and values it dumps."""
    lines = [line.strip().removeprefix("- ") for line in message.splitlines()]
    kept = [line for line in lines if line and not line.startswith(_NOISE)]
    told = " ".join(kept or lines[:1])
    return re.sub(r"\bNamespace\(.*", "…", told).strip().rstrip(".")


def parser_line(message: str, prog: str, options: list[str]) -> AlignkitError:
    """Return the line about arguments that a parser refused.

    Args:
        message: The parser's own.
        prog: The command, for its help.
        options: Every option there is, for what may have been meant.
    """
    loss = unknown_loss_in(message)
    if loss is not None:
        return loss
    told = re.sub(r'^Parser key "(.*?)":\s*', r"\1: ", plain_message(message))
    wrong = re.search(r"--([\w.]+)|[Oo]ption '([\w.]+)' is not accepted", message)
    hint = ""
    if wrong and ("unrecognized" in message or "not accepted" in message):
        name = wrong[1] or wrong[2]
        near = difflib.get_close_matches(name, options, n=1, cutoff=0.6)
        last = {option.rpartition(".")[2]: option for option in options}
        near = near or [last[n] for n in difflib.get_close_matches(name.rpartition(".")[2], last)]
        hint = f"; did you mean --{near[0]}?" if near else ""
    return AlignkitError(f"{told}{hint}; see {prog.replace(' [options]', '')} --help")


def _advice(text: str) -> str:
    """Return which option to change: those of the trainer's that a message names."""
    package = re.search(r"pip install (?:-U )?['\"]?([\w-]+)", text)
    if package:
        return f"; pip install {package[1]}"
    names = [name for name in inspect.signature(Trainer.__init__).parameters if name != "self"]
    named = [name for name in names if re.search(rf"\b{name}\b", text)]
    if not named and "backend found" in text:
        named = ["accelerator"]
    return f"; change {' or '.join(f'--trainer.{name}' for name in named[:2])}" if named else ""


def _raised_here(trace: TracebackType | None) -> bool:
    """Whether an exception was raised by our own code rather than by a library's."""
    name = ""
    while trace is not None:
        name = trace.tb_frame.f_globals.get("__name__", "")
        trace = trace.tb_next
    return name.partition(".")[0] == "alignkit"
