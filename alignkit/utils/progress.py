"""Show how far something has come: a bar on a terminal, and elsewhere a line now and then."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Column

from alignkit.utils.phases import is_quiet
from alignkit.utils.ranks import is_first_rank

_SHARES = 10  # a line at every tenth of the whole
_LINE_SECONDS = 10.0  # and at the latest after so long
_REFRESH_SECONDS = 0.1


class Display:
    """Show counts side by side until it is closed.

    Where nobody watches, because the output goes to a file or a pipe, a count becomes lines: for
    its first and last step, each tenth of the whole, and at least every ten seconds.

    Args:
        stream: Where to show them; standard error by default, so that results stay alone on
            standard output.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        stream = sys.stderr if stream is None else stream
        self._silent = is_quiet() or not is_first_rank()
        self._stream = stream
        self._bars = None if self._silent or not _is_watched(stream) else _make_bars(stream)
        if self._bars is not None:
            self._bars.start()

    def count(self, what: str, total: int | None, *, tenths: bool = True) -> Count:
        """Begin to count something.

        Args:
            what: What is counted, in the singular.
            total: How many there will be, if that is known.
            tenths: Whether its beginning, its end and each tenth have a line of their own.
        """
        return Count(self, what, total, tenths)

    def close(self) -> None:
        """End the display, and leave what was shown last."""
        if self._bars is not None:
            self._bars.refresh()
            self._bars.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def line(self, text: str) -> None:
        """Write a line where there is no bar."""
        if not self._silent and self._bars is None:
            print(text, file=self._stream, flush=True)


class Count:
    """Count one thing within a `Display`.

    Args:
        display: Where to show it.
        what: What is counted, in the singular.
        total: How many there will be, if that is known.
        tenths: Whether its beginning, its end and each tenth have a line of their own.
    """

    def __init__(self, display: Display, what: str, total: int | None, tenths: bool) -> None:
        self.display, self.what, self.total, self.tenths = display, what, total, tenths
        self._task: TaskID | None = None
        self._bars = display._bars
        self._told = -1
        self._time = time.monotonic()
        if self._bars is not None:
            self._task = self._bars.add_task(self._name(0), total=total, shown="")

    def reach(self, done: int, shown: str = "", *, now: bool = False) -> None:
        """Show how many are done.

        Args:
            done: How many.
            shown: What to show beside it.
            now: Show it even if something was shown a moment ago.
        """
        clock = time.monotonic()
        if self.total is not None:
            self.total = max(self.total, done)  # an estimate may have been too low
        if self._bars is not None and self._task is not None:
            self._bars.update(
                self._task,
                completed=done,
                total=self.total,
                description=self._name(done),
                shown=shown,
            )
            if now or done == self.total or clock - self._time > _REFRESH_SECONDS:
                self._time = clock
                self._bars.refresh()
        elif now or self._is_due(done, clock):
            self._told, self._time = done, clock
            self.display.line("  ".join(filter(None, [self._name(done), shown])))

    def end(self) -> None:
        """Show this count no longer."""
        if self._bars is not None and self._task is not None:
            self._bars.remove_task(self._task)
            self._task = None

    def _is_due(self, done: int, clock: float) -> bool:
        if clock - self._time > _LINE_SECONDS:
            return done != self._told
        if not self.tenths:
            return False
        if self._told < 0 or done == self.total:
            return done != self._told
        if self.total is None:
            return False
        return done * _SHARES // self.total > self._told * _SHARES // self.total

    def _name(self, done: int) -> str:
        return f"{self.what} {done}" + ("" if self.total is None else f"/{self.total}")


@contextmanager
def counting(what: str, total: int | None) -> Iterator[Count]:
    """Show one count on standard error within the block."""
    with Display() as display:
        yield display.count(what, total)


def _make_bars(stream: TextIO) -> Progress:
    return Progress(
        TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True)),
        BarColumn(bar_width=None, table_column=Column(ratio=1, min_width=4)),
        TextColumn("{task.fields[shown]}", markup=False, table_column=Column(no_wrap=True)),
        TimeRemainingColumn(compact=True, table_column=Column(no_wrap=True)),
        console=Console(file=stream),
        # Without a thread of its own, which could hold a lock while a data worker is forked.
        auto_refresh=False,
        # What is written meanwhile goes above the bar, unless it goes to a file.
        redirect_stdout=sys.stdout.isatty(),
        redirect_stderr=sys.stderr.isatty(),
        expand=True,
    )


def _is_watched(stream: TextIO) -> bool:
    """Tell whether a stream leads to a terminal that can redraw a line, or to a notebook."""
    terminal = stream.isatty() and os.environ.get("TERM") != "dumb"
    return terminal or Console(file=stream).is_jupyter
