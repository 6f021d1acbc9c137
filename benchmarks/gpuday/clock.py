"""Times work on a device, in interleaved rounds, and finds its peak of memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch

from alignkit.utils.memory import peak_bytes, reset_peak

Work = Callable[[], object]


def wait(device: str) -> None:
    """Wait until the device has done everything that it was told."""
    if device == "cuda":
        torch.cuda.synchronize()


def seconds(work: Work, device: str, calls: int = 1) -> float:
    """Seconds of one call, over several that follow each other without a wait between them."""
    wait(device)
    began = time.perf_counter()
    for _ in range(calls):
        work()
    wait(device)
    return (time.perf_counter() - began) / calls


def interleaved(
    arms: Mapping[str, Work], rounds: int, calls: int, device: str, is_late: Callable[[], bool]
) -> dict[str, list[float]]:
    """Seconds of every arm in every round, backwards in every second one; the arms are warm."""
    found: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(rounds):
        if number and is_late():
            break
        for name in reversed(arms) if number % 2 else arms:
            found[name].append(seconds(arms[name], device, calls))
    return found


def peak_above(work: Work, device: str) -> int:
    """Most bytes in use during work, above those in use before it."""
    where = torch.device(device)
    wait(device)
    before = torch.cuda.memory_allocated() if device == "cuda" else 0
    reset_peak(where)
    if device != "cuda":
        before = peak_bytes(where)
    work()
    wait(device)
    return peak_bytes(where) - before
