"""Limit how many compiled matrix products oneDNN, PyTorch's CPU library for them, may keep."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# A product is compiled when its shape first occurs, and then kept in half a MiB. Every packed row
# has a length and tiles of its own, which are some hundred shapes for 4,096 tokens. The default of
# 1,024 products in each of two caches fills up with shapes that do not come again. This limit holds
# the shapes of a row of 8,000 tokens, which every layer needs.
PRODUCTS = 256
# oneDNN's own cache, and that of the layer between it and PyTorch.
LIMITS = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")


def bound_caches() -> None:
    """Keep both caches at `PRODUCTS`, unless the environment says otherwise.

    Call this before the first product of the process, which reads the limits.
    """
    for name in LIMITS:
        os.environ.setdefault(name, str(PRODUCTS))


@contextmanager
def fp32_products(dtype: torch.dtype) -> Iterator[None]:
    """Let fp32 products of bf16 values take the bf16 units.

    The operands are bf16 numbers held in fp32, so that rounding them to bf16 changes nothing,
    while sums and results stay fp32. Without it these products fall to a slower library.

    Args:
        dtype: Of the values; for any other than bf16 nothing changes.
    """
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    try:
        if dtype == torch.bfloat16:
            matmul.fp32_precision = "bf16"
        yield
    finally:
        matmul.fp32_precision = before
