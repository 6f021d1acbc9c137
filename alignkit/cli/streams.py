"""Let a command run to its end after the readers of its output have gone."""

from __future__ import annotations

import io
import os
import sys
from typing import Any


class _UnreadFile(io.FileIO):
    """Write to a pipe, and discard what is written once the pipe is closed."""

    def write(self, data: Any, /) -> int:
        """Write bytes, or discard them after a reader such as ``| head`` has exited."""
        try:
            return super().write(data)
        except BrokenPipeError:
            _redirect_to_null(self.fileno())
            return super().write(data)


def survive_closed_streams() -> None:
    """Keep the command running when standard output or error is closed.

    A training run must not end because ``| head`` or a log viewer has ended. Call this before
    anything keeps a reference to the streams.
    """
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is None:  # closed from the start, so the next file would take its number
            _redirect_to_null(number)
            setattr(sys, name, os.fdopen(number, "w", encoding="utf-8", closefd=False))
        elif stream is getattr(sys, f"__{name}__") and not stream.isatty():
            stream.flush()
            raw = io.BufferedWriter(_UnreadFile(number, "w", closefd=False))
            wrapped = io.TextIOWrapper(
                raw,
                encoding=stream.encoding,
                errors=stream.errors,
                line_buffering=stream.line_buffering,
                write_through=stream.write_through,
            )
            setattr(sys, name, wrapped)


def _redirect_to_null(number: int) -> None:
    null = os.open(os.devnull, os.O_WRONLY)
    if null != number:
        os.dup2(null, number)
        os.close(null)
