"""End a command on a signal with one line and the exit status that shells expect."""

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
    """Exit because of a signal, with the exit status 128 plus the signal's number.

    Args:
        signum: The signal.
        status: Another exit status, if not that one.

    Example:
        >>> Stopped(signal.SIGTERM).code
        143
    """

    def __init__(self, signum: int, status: int | None = None) -> None:
        super().__init__(128 + signum if status is None else status)
        self.signum = signum


@contextmanager
def stop_on_signals() -> Iterator[None]:
    """Let SIGTERM and Ctrl-C print one line and raise `Stopped` at once.

    A running trainer installs handlers of its own in their place, which let it save first.
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
    """Raise `Stopped` and pass the signal on: the handler for when there is nothing to save.

    Training processes that were forked or spawned from this one get SIGTERM. Python waits for them
    when this process exits.
    """
    multiprocessing = sys.modules.get("multiprocessing")  # without it there are no children
    children = multiprocessing.active_children() if multiprocessing else []
    training = [child.pid for child in children if not child.daemon and child.pid is not None]
    for process in training:
        os.kill(process, signal.SIGTERM)
    done = "told the training processes" if training else "stopped at once"
    write_line(f"{signal.Signals(signum).name}: {done}")
    raise Stopped(signum)


def exit_on_signals() -> None:
    """Let SIGTERM and Ctrl-C end a process that is about to exit, without a stack trace."""
    for signum in (signal.SIGTERM, signal.SIGINT):
        if signal.getsignal(signum) != signal.SIG_IGN:
            signal.signal(signum, lambda signum, frame: os._exit(128 + signum))


def ignore_signals() -> None:
    """Ignore signals in a child process, such as a data loader's worker, whose parent ends it.

    A terminal's Ctrl-C and SLURM's signals reach every process of a job.
    """
    for name in ("SIGTERM", "SIGINT", "SIGUSR1"):
        if hasattr(signal, name):  # Windows has no SIGUSR1
            signal.signal(getattr(signal, name), signal.SIG_IGN)


def write_line(line: str) -> None:
    """Write a line to standard error from within a signal handler, on the first rank alone.

    It uses `os.write`, because `print` and logging are not reentrant.
    """
    if is_first_rank():
        os.write(2, f"alignkit: {line}\n".encode())
