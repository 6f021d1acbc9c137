"""How many compiled matrix products oneDNN, PyTorch's library for them on the CPU, may keep."""

from __future__ import annotations

import os

# A shape's product is compiled when it first occurs and then kept, half a MiB each. Every packed
# row has a length and tiles of its own, some hundred shapes for 4,096 tokens, so that the default
# of 1,024 in each of two caches fills up with rows that do not come again. This is room for a row
# of 8,000 tokens, which needs its shapes in every layer.
PRODUCTS = 256
# oneDNN's own cache, and that of the layer between it and PyTorch.
LIMITS = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")


def bound_caches() -> None:
    """Keep both caches at `PRODUCTS`, unless the environment says otherwise.

    The limits are read at the first product of the process: call it before.
    """
    for name in LIMITS:
        os.environ.setdefault(name, str(PRODUCTS))
