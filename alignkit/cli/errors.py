"""Explain an exception that ends a command in one line: what is wrong, and what to change."""

from __future__ import annotations

import importlib.util
import inspect
import re
import traceback
from collections.abc import Callable

from lightning.pytorch import Trainer
from lightning.pytorch.trainer.call import _interrupt

from alignkit.cli.failure import Failure
from alignkit.cli.messages import plain
from alignkit.errors import AlignkitError, find_user_error
from alignkit.utils.ranks import is_lost_connection

USER, FAILED = 2, 1
"""Exit statuses: the user has to change something first; or the command has failed otherwise."""

_LONGEST = 600  # characters that are shown of a library's message
# Files that raise exceptions about one option.
_OPTIONS = (
    ("lightning/pytorch/loggers/", "trainer.logger"),
    ("lightning/fabric/loggers/", "trainer.logger"),
    ("tensorboard/", "trainer.logger"),
    ("lightning/pytorch/callbacks/", "trainer.callbacks"),
    ("lightning/pytorch/profilers/", "trainer.profiler"),
    ("lightning/fabric/accelerators/", "trainer.accelerator"),
    ("lightning/pytorch/trainer/connectors/accelerator_connector", "trainer.accelerator"),
    ("lightning/pytorch/plugins/precision/", "trainer.precision"),
    ("lightning/fabric/plugins/precision/", "trainer.precision"),
    ("lightning/fabric/plugins/environments/", "trainer.devices"),
    ("lightning/pytorch/strategies/", "trainer.strategy"),
    ("lightning/fabric/utilities/seed", "seed_everything"),
    ("torch/cuda/", "trainer.accelerator"),
    ("torch/optim/", "model.optimizer"),
)
# The options that choose the folder that these write to.
_FOLDERS = {
    "trainer.logger": "trainer.logger.save_dir",
    "trainer.callbacks": "trainer.callbacks.dirpath",
}
# Libraries whose exceptions of `_REFUSALS` are about the user's options.
_LIBRARIES = ("lightning", "jsonargparse", "torch/optim/", "torch/cuda/", "torch/distributed/")
_REFUSALS = {
    "AssertionError",
    "ImportError",
    "MisconfigurationException",
    "ModuleNotFoundError",
    "NotImplementedError",
    "OSError",
    "RuntimeError",
    "TypeError",
    "ValueError",
}
# Parts of messages that advise what a user of the command cannot do.
_USELESS = re.compile(
    r"HINT: Did you call .*|Find a complete list .*|For more (?:info|details).*|\(?https?://\S+|"
    r"Compile with `TORCH_USE_CUDA_DSA`.*|CUDA kernel errors might .*",
    re.DOTALL,
)
_NO_MEMORY = (
    r"out of memory|can't allocate memory|Cannot allocate memory|CUBLAS_STATUS_ALLOC_FAILED"
)

Explanation = tuple[str, int]
"""A line for the user, and an exit status."""


def explain(error: BaseException) -> Explanation:
    """Return the line that a user reads about an exception, and the exit status.

    Example:
        >>> explain(AlignkitError("prompts: none was given; pass --prompts TEXT"))
        ('prompts: none was given; pass --prompts TEXT', 2)
    """
    error = _original_error(error)
    user = find_user_error(error)
    if user is not None:  # a worker's error holds its stack trace in its message
        return _one_line(Failure.of(user).message), USER
    failure = Failure.of(error)
    if failure.name in (AlignkitError.__name__, "OptionError"):  # from another process
        return _one_line(failure.message), USER
    for rule in _RULES:
        told = rule(failure)
        if told is not None:
            return told
    if is_lost_connection(error):
        said = _shorten(failure.message)
        return f"the connection to another process of this run was lost ({said})", FAILED
    return _explain_unforeseen(failure)


def _original_error(error: BaseException) -> BaseException:
    """Return the exception that ended training, if cleaning up after it raised another one."""
    while error.__context__ is not None and any(
        frame.f_code is _interrupt.__code__ for frame, _ in traceback.walk_tb(error.__traceback__)
    ):
        error = error.__context__
    return error


def _explain_memory(failure: Failure) -> Explanation | None:
    named = failure.name in ("MemoryError", "OutOfMemoryError")
    if not named and not re.search(_NO_MEMORY, failure.message):
        return None
    return (
        f"out of memory{_in_brackets(failure)}; lower data.tokens_per_batch, or set "
        "model.activation_checkpointing true",
        FAILED,
    )


def _explain_process(failure: Failure) -> Explanation | None:
    if re.search(r"DataLoader worker .*(exited unexpectedly|killed by signal)", failure.message):
        return f"a data worker ended{_in_brackets(failure)}; try --data.num_workers 0", FAILED
    if failure.name == "ProcessExitedException":
        return (
            f"a process of this run ended{_in_brackets(failure)}; if memory ran out, lower "
            "data.tokens_per_batch",
            FAILED,
        )
    return None


def _explain_port(failure: Failure) -> Explanation | None:
    if not re.search(r"EADDRINUSE|[Aa]ddress already in use", failure.message):
        return None
    return "another run uses the same port; set MASTER_PORT to one that is free", USER


def _explain_system_error(failure: Failure) -> Explanation | None:
    found = re.match(r"\[Errno \d+\] ([^:]+)(?:: (.+))?", failure.message, re.DOTALL)
    if found is None and "PytorchStreamWriter failed" not in failure.message:
        return None
    reason, path = found.groups() if found else ("the disk may be full", None)
    option = _option_of_place(failure)
    folder = _FOLDERS.get(option, "trainer.default_root_dir")
    written = f"what {option} writes" if option else "a file"
    advice = f"; choose another --{folder}" if option else ""
    return f"{_one_line(path or written)}: {reason}{advice}", USER


def _explain_missing_package(failure: Failure) -> Explanation | None:
    said = _shorten(failure.message)
    found = re.search(r"Requirement '(?P<needs>(?P<name>[\w.-]+)[^']*)' not met", said)
    found = found or re.search(
        r"pip install (?:-U )?['\"]?(?P<needs>(?P<name>[\w.-]+)[^\s'\"`]*)", said
    )
    inside = next(iter(failure.files), "").startswith(("lightning", "torch"))
    if found is None and inside and failure.name == "ModuleNotFoundError":
        found = re.search(r"No module named '(?P<needs>(?P<name>\w+))", said)
    if found is None:
        return None
    who = re.match(r"(?:[\w.]+\.)?(\w+): ", said)
    old = importlib.util.find_spec(found["name"].replace("-", "_").partition(".")[0])
    option = _find_option(failure)
    return (
        f"{who[1] if who else option or 'this'} needs the package {found['needs']}: pip install "
        f"{'-U ' if old else ''}{found['name']}"
        f"{f', or choose another --{option}' if option else ''}",
        USER,
    )


def _explain_refusal(failure: Failure) -> Explanation | None:
    inside = next(iter(failure.files), "").startswith(_LIBRARIES)
    if not inside or failure.name not in _REFUSALS:
        return None
    option = _find_option(failure)
    return f"{_shorten(failure.message)}{f'; change --{option}' if option else ''}", USER


_RULES: tuple[Callable[[Failure], Explanation | None], ...] = (
    _explain_memory,
    _explain_process,
    _explain_port,
    _explain_system_error,
    _explain_missing_package,
    _explain_refusal,
)


def _explain_unforeseen(failure: Failure) -> Explanation:
    file, line, ours = failure.origin
    told = f"{failure.name}: {_shorten(failure.message)} ({file}:{line})"
    if ours:
        return f"internal error: {told}; please report it, with the trace of --debug", FAILED
    return f"{told}; --debug shows the trace", FAILED


def _find_option(failure: Failure) -> str:
    """Return the option that a message names, or the one that the raising file belongs to."""
    known = [name for name in inspect.signature(Trainer.__init__).parameters if name != "self"]
    names = "|".join(sorted(known, key=len, reverse=True))
    for pattern in (r"[`(]({})\b", r"\b({})=", r"\b({})\b"):
        found = re.search(pattern.format(names), failure.message)
        if found:
            return f"trainer.{found[1]}"
    return _option_of_place(failure)


def _option_of_place(failure: Failure) -> str:
    for place in failure.files:
        for start, option in _OPTIONS:
            if place.startswith(start):
                return option
    return ""


def _shorten(message: str) -> str:
    """Return a library's message as one line, without dumps and advice that cannot be followed."""
    if "Given value" in message or "Problem with given class_path" in message:
        message = plain(message)
    told = _one_line(_USELESS.sub("", message)).rstrip(" .;!")
    return told if len(told) <= _LONGEST else f"{told[:_LONGEST]}…"


def _one_line(text: str) -> str:
    return " ".join(filter(None, map(str.strip, text.splitlines())))


def _in_brackets(failure: Failure) -> str:
    first = failure.message.strip().partition("\n")[0].partition(". ")[0]
    return f" ({first})" if first else ""
