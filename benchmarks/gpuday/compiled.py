"""`torch.compile` of the blocks on and off: what it takes to compile, and what a step gains."""

from __future__ import annotations

import math
import time
from contextlib import AbstractContextManager, nullcontext
from statistics import median

import torch
import torch._dynamo.config

from gpuday import bare
from gpuday.clock import interleaved, peak_above, wait
from gpuday.day import Day

_WARM_UP = 3
"""Steps over rows of different lengths, after which nothing is compiled again."""


def measure(day: Day) -> None:
    """Time DPO's bare step both ways, in turns, shape by shape."""
    for shape in reversed(day.sizes.shapes):  # the smaller one compiles sooner
        if day.has(f"{shape}: compiled: time per step"):
            continue
        if day.is_late():
            raise TimeoutError(f"no time was left for {shape}")
        # Compiling takes a CPU most of a minute, which sizes of no interest are not worth.
        tiny: AbstractContextManager[object] = nullcontext()
        if day.tiny:
            tiny = torch._dynamo.config.patch(disable=True)
        with tiny:
            _compare(day, shape)
        bare.free(day)


def _compare(day: Day, shape: str) -> None:
    batches = bare.batches_of(day, bare.steps_of(day, "dpo", shape, _WARM_UP))
    about = {"per_step": day.sizes.per_step, "task": "dpo", "trainer": "none"}
    arms: dict[str, bare.Step] = {}
    losses: list[float] = []
    for name, compiles in (("eager", False), ("compiled", True)):
        torch.manual_seed(0)  # the same adapters both times
        step = bare.Step(bare.build(day, "dpo", shape, compile=compiles), batches)
        took = []
        for _ in range(_WARM_UP):
            began = time.perf_counter()
            step()
            wait(day.device)
            took.append(time.perf_counter() - began)
        losses.append(float(step.loss) if step.loss is not None else math.nan)
        day.note(f"{shape}: {name}: first step", took[0], "s", warm_up=took, **about)
        peak = peak_above(step, day.device)
        day.note(f"{shape}: {name}: peak above the model", peak / 2**30, "GiB", **about)
        arms[name] = step
    found = interleaved(arms, day.sizes.rounds, _WARM_UP, day.device, day.is_late)
    day.note(f"{shape}: loss differs", abs(losses[0] - losses[1]), "nats", losses=losses, **about)
    pairs = zip(found["eager"], found["compiled"], strict=True)
    day.note(f"{shape}: eager over compiled", median(a / b for a, b in pairs), "×", **about)
    for name, times in found.items():
        day.note(f"{shape}: {name}: time per step", median(times), "s", rounds=times, **about)
