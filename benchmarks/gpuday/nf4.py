"""DPO over a base in 4 bits: what a step takes in time and memory beside one in bf16."""

from __future__ import annotations

from importlib.util import find_spec
from statistics import median

import torch

from gpuday import bare
from gpuday.clock import peak_above, seconds
from gpuday.day import Day, NotRun


def measure(day: Day) -> None:
    """Time the bare step of the largest shape, over nf4 and over bf16."""
    if find_spec("bitsandbytes") is None:
        raise NotRun("bitsandbytes is not installed")
    shape = day.sizes.shapes[0]
    steps = bare.steps_of(day, "dpo", shape, 2)
    about = {"shape": shape, "per_step": day.sizes.per_step, "task": "dpo", "trainer": "none"}
    # nf4 last: packing takes a CPU a while, and may be broken off.
    for name, quantize in (("bf16", None), ("nf4", "nf4")):
        before = torch.cuda.memory_allocated() if day.device == "cuda" else 0
        module = bare.build(day, "dpo", shape, quantize=quantize)
        if day.device == "cuda":
            held = torch.cuda.memory_allocated() - before
            day.note(f"{name}: model", held / 2**30, "GiB", **about)
        step = bare.Step(module, bare.batches_of(day, steps))
        for _ in steps:
            step()
        times = [seconds(step, day.device, len(steps)) for _ in range(day.sizes.rounds)]
        day.note(f"{name}: time per step", median(times), "s", rounds=times, **about)
        day.note(
            f"{name}: peak above the model", peak_above(step, day.device) / 2**30, "GiB", **about
        )
        del module, step
        bare.free(day)
