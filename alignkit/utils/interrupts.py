"""How a signal ends a command: a line, and the exit status that shells expect of it."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from alignkit.utils.ranks import is_first_rank


class Stopped(SystemExit):
    """A signal has ended the process in order; its exit status is 128 and the signal's number.

    Args:
        signum: The signal.
        status: Another exit status.
    """

    def __init__(self, signum: int, status: int | None = None) -> None:
        super().__init__(128 + signum if status is None else status)
        self.signum = signum


@contextmanager
def stop_on_signals() -> Iterator[None]:
    """Let SIGTERM and Ctrl-C raise `Stopped` at once, after a line.

    A trainer that runs puts its own handlers in their place, which let it save first.
    """
    kept = {}
    if threading.current_thread() is threading.main_thread():
        for signum in (signal.SIGTERM, signal.SIGINT):
            if signal.getsignal(signum) in (signal.SIG_DFL, signal.default_int_handler):
                kept[signum] = signal.signal(signum, stop_at_once)
    try:
        yield
    finally:
        for signum, handler in kept.items():
            signal.signal(signum, handler)


def stop_at_once(signum: int, frame: FrameType | None = None) -> None:
    """Raise `Stopped`: the handler while there is nothing to save.

    Training processes that were forked or spawned from this one are told as well; it waits for
    them when it exits.
    """
    multiprocessing = sys.modules.get("multiprocessing")  # without it there are no children
    children = multiprocessing.active_children() if multiprocessing else []
    training = [child.pid for child in children if not child.daemon and child.pid is not None]
    for process in training:
        os.kill(process, signal.SIGTERM)
    done = "told the training processes" if training else "stopped at once; nothing was saved"
    say(f"{signal.Signals(signum).name}: {done}")
    raise Stopped(signum)


def leave_on_signals() -> None:
    """Let SIGTERM and Ctrl-C end a process that is about to exit, without a stack trace."""
    for signum in (signal.SIGTERM, signal.SIGINT):
        if signal.getsignal(signum) != signal.SIG_IGN:
            signal.signal(signum, lambda signum, frame: os._exit(128 + signum))


def ignore_signals() -> None:
    """Leave it to the main process what becomes of a helper such as a data loader's worker.

    A terminal's Ctrl-C and SLURM's signals reach every process of a job.
    """
    for name in ("SIGTERM", "SIGINT", "SIGUSR1"):
        if hasattr(signal, name):  # Windows knows two of them
            signal.signal(getattr(signal, name), signal.SIG_IGN)


def say(line: str) -> None:
    """Write a line to standard error from within a signal handler, on the first rank alone.

    Neither `print` nor logging may be entered a second time in the middle of a call.
    """
    if is_first_rank():
        os.write(2, f"alignkit: {line}\n".encode())
