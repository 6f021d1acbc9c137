"""The machine's own limits: a large bf16 product, and a copy."""

from __future__ import annotations

from statistics import median

import torch
from sidebyside.flops import matmul_ceiling

from gpuday.clock import seconds
from gpuday.day import Day


def measure(day: Day) -> None:
    """Note bf16 TFLOP/s, and GB/s of a copy, bytes read and written."""
    size = day.sizes.matmul
    day.note("bf16 matmul", matmul_ceiling(day.device, size) / 1e12, "TFLOP/s", size=size)
    source = torch.zeros(day.sizes.copy_bytes, dtype=torch.uint8, device=day.device)
    target = torch.empty_like(source)
    target.copy_(source)
    taken = [seconds(lambda: target.copy_(source), day.device, calls=5) for _ in range(5)]
    day.note(
        "copy",
        2 * day.sizes.copy_bytes / median(taken) / 1e9,
        "GB/s",
        bytes_copied=day.sizes.copy_bytes,
    )
