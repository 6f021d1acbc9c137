"""Measure in which dtype a CPU multiplies faster; those without bf16 instructions take minutes."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


def bf16_slowdown(size: int = 256, repeats: int = 3) -> float:
    """Return the time of a bf16 product on this CPU by that of the same product in fp32.

    Args:
        size: Of the square factors. A CPU that computes bf16 value by value takes 70 times as long
            at 256, and has the answer in a tenth of a second.
        repeats: Products of each dtype; the fastest counts.
    """

    def seconds(dtype: torch.dtype) -> float:
        a = torch.ones(size, size, dtype=dtype)
        return min(_timed(lambda: a @ a) for _ in range(repeats))

    return seconds(torch.bfloat16) / seconds(torch.float32)


def faster_dtype() -> str:
    """Return the dtype, ``bfloat16`` or ``float32``, in which this CPU multiplies faster."""
    return "bfloat16" if bf16_slowdown(768) < 1 else "float32"


def _timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
