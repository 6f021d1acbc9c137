"""Waiting for the device: what makes the host wait in a step, and how long the device idles.

A training step must not wait. One wait an optimizer step is meant: the guard that stops a run whose
loss is not finite reads three numbers before the optimizer moves.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from gpuday import bare
from gpuday.clock import Work, wait
from gpuday.day import Day

_STEPS = 3


def measure(day: Day) -> None:
    """Count the waits of a bare step over new rows, and profile three."""
    for shape in day.sizes.shapes:
        batches = bare.batches_of(day, bare.steps_of(day, "dpo", shape, 2 + _STEPS))
        step = bare.Step(bare.build(day, "dpo", shape), batches)
        step()
        step()
        about = {"shape": shape, "steps": _STEPS, "trainer": "none", "rows": "new in every step"}
        with waits(day.device) as found:
            for _ in range(_STEPS):
                step()
        day.note(f"{shape}: waits", sum(found.values()) / _STEPS, "a step", where=found, **about)
        idle, launched = _idle(step, day.device)
        day.note(f"{shape}: device idle", idle, "of the time", kernels_a_step=launched, **about)
        del step
        bare.free(day)


@contextmanager
def waits(device: str) -> Iterator[Counter[str]]:
    """Count what makes the host wait for the device, by the line of code that does."""
    found: Counter[str] = Counter()
    if device != "cuda":
        yield found
        return
    wait(device)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for warning in caught:
        if "synchronizing CUDA operation" in str(warning.message):
            path = Path(warning.filename)
            found["/".join(path.parts[-3:]) + f":{warning.lineno}"] += 1


def _idle(work: Work, device: str) -> tuple[float | None, float]:
    """Share of the device's time, first kernel to last, in which none ran; kernels a call."""
    if device != "cuda":
        work()
        return None, 0.0
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
        for _ in range(_STEPS):
            work()
        wait(device)
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in trace.events()
        # Annotations, such as the optimizer's, span gaps; kernels and copies do not.
        if event.device_type == DeviceType.CUDA
        and not getattr(event, "is_user_annotation", False)
        and not event.name.startswith(("Optimizer.", "ProfilerStep", "## Call"))
    )
    if not spans:
        return None, 0.0
    busy, reached = 0.0, spans[0][0]
    for start, end in spans:
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return 1.0 - busy / (reached - spans[0][0]), len(spans) / _STEPS
