"""Takes the parts in turn, each within its share of the time, whatever became of the last."""

from __future__ import annotations

import importlib
import math
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from types import FrameType

import torch

from gpuday import bare
from gpuday.day import Day, NotRun
from gpuday.record import ERROR, WHOLE

PARTS = {
    "cuda-tests": ("cuda_tests", 18),
    "ceiling": ("ceiling", 2),
    "steps": ("steps", 50),
    "rows": ("rows", 8),
    "attention": ("attention", 8),
    "compile": ("compiled", 10),
    "nf4": ("nf4", 8),
    "sync": ("sync", 4),
    "train": ("train", 6),
}
"""By name, in order of what they are worth: the file of each, and its share of the time."""
GRACE = 1.3
"""A part that outlasts its share by this factor, and `GRACE_SECONDS`, is broken off."""
GRACE_SECONDS = 20.0


class BrokenOff(BaseException):
    """A part went on long after its share of the time was used; no part may catch it."""


def run(day: Day, parts: Sequence[str], limit: float) -> list[str]:
    """Run parts that are not whole yet; what a part leaves over goes to the later ones.

    Args:
        day: What every part is given.
        parts: Names, in order.
        limit: Seconds for all of them.

    Returns:
        The parts that failed or did not come to their end.
    """
    left = [part for part in parts if not day.figures.is_whole(part)]
    for part in parts:
        if part not in left:
            day.console.print(f"{part}: whole already", style="dim")
    end = time.monotonic() + limit
    failed = []
    for number, part in enumerate(left):
        weights = [PARTS[name][1] for name in left[number:]]
        share = (end - time.monotonic()) * weights[0] / sum(weights)
        if not _run_one(day, part, share):
            failed.append(part)
            if is_poisoned(day.device):
                day.console.print(f"{part}: left the device unusable; a new process goes on")
                raise Poisoned(failed, left[number + 1 :], end - time.monotonic())
    return failed


class Poisoned(Exception):
    """A CUDA error that outlives its cause: nothing more can run in this process."""

    def __init__(self, failed: list[str], left: list[str], seconds: float) -> None:
        super().__init__(failed, left, seconds)
        self.failed, self.left, self.seconds = failed, left, seconds


def _run_one(day: Day, part: str, share: float) -> bool:
    day.part, began = part, time.monotonic()
    day.deadline = began + share
    try:
        measure: Callable[[Day], None] = importlib.import_module(f"gpuday.{PARTS[part][0]}").measure
        with _Alarm(math.ceil(max(share, 1.0) * GRACE + GRACE_SECONDS)):
            measure(day)
        day.note(WHOLE, time.monotonic() - began, "s")
        return True
    except NotRun as reason:
        day.note("not run", str(reason), "")  # not whole: a later run may have what was missing
        return True
    except (Exception, BrokenOff) as error:
        day.console.print_exception()
        day.note(
            ERROR,
            f"{type(error).__name__}: {error}"[:1000],
            "",
            trace=traceback.format_exc()[-3000:],
        )
        return False
    finally:
        if not is_poisoned(day.device):
            bare.free(day)


def is_poisoned(device: str) -> bool:
    """Whether an error has left CUDA unusable in this process."""
    if device != "cuda":
        return False
    try:
        torch.cuda.synchronize()
        torch.ones(1, device=device).sum().item()
    except RuntimeError:
        return True
    return False


def go_on(poisoned: Poisoned, arguments: Sequence[str]) -> None:
    """Replace this process by one that takes the parts that are left."""
    more = ["--parts", ",".join(poisoned.left), "--limit", str(max(poisoned.seconds, 1.0))]
    os.execv(sys.executable, [sys.executable, sys.argv[0], *arguments, *more, "--failed-before"])


class _Alarm:
    """Raises `BrokenOff` in the main thread after some seconds, where the system can."""

    def __init__(self, seconds: int) -> None:
        self.seconds = seconds

    def __enter__(self) -> None:
        if hasattr(signal, "SIGALRM"):
            self._before = signal.signal(signal.SIGALRM, self._ring)
            signal.alarm(self.seconds)

    def __exit__(self, *_: object) -> None:
        if hasattr(signal, "SIGALRM"):
            signal.alarm(0)
            signal.signal(signal.SIGALRM, self._before)

    def _ring(self, number: int, frame: FrameType | None) -> None:
        raise BrokenOff(f"took more than {self.seconds} s")
