"""A command whose output nobody reads any more goes on to its end."""

from __future__ import annotations

import io
import os
import sys
from typing import Any


class _Unread(io.FileIO):
    """A file that forgets what it is given once its reader is gone."""

    def write(self, data: Any, /) -> int:
        """Write bytes; to nowhere from where ``| head`` has read enough."""
        try:
            return super().write(data)
        except BrokenPipeError:
            _to_nowhere(self.fileno())
            return super().write(data)


def outlive_readers() -> None:
    """Let standard output and error be closed, before or while the command runs.

    A training run must not end because ``| head`` or a log viewer has. Call it before anything
    keeps a reference to the streams.
    """
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is None:  # closed from the start: the next file opened would take its number
            _to_nowhere(number)
            setattr(sys, name, os.fdopen(number, "w", closefd=False))
        elif stream is getattr(sys, f"__{name}__") and not stream.isatty():
            stream.flush()
            raw = io.BufferedWriter(_Unread(number, "w", closefd=False))
            wrapped = io.TextIOWrapper(
                raw,
                encoding=stream.encoding,
                errors=stream.errors,
                line_buffering=stream.line_buffering,
                write_through=stream.write_through,
            )
            setattr(sys, name, wrapped)


def _to_nowhere(number: int) -> None:
    null = os.open(os.devnull, os.O_WRONLY)
    if null != number:
        os.dup2(null, number)
        os.close(null)
