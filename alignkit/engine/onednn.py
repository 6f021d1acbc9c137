"""Limit how many compiled matrix products oneDNN, PyTorch's CPU library for them, may keep."""

from __future__ import annotations

import os

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
