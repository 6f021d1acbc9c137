"""How a packed row attends: which plan is chosen for a device, a dtype and a reach."""

from __future__ import annotations

import logging
from functools import lru_cache

import torch

from alignkit.batch import Span
from alignkit.engine.segments import (
    AttentionPlan,
    DenseAttention,
    Reach,
    SegmentAttention,
    Window,
)
from alignkit.engine.tiles import TiledAttention
from alignkit.engine.varlen import VarlenAttention, varlen_refusal

log = logging.getLogger(__name__)


# Policy and reference score the same row, and a model's layers may differ in their windows: each
# is laid out once.
@lru_cache(maxsize=4)
def make_plan(
    spans: tuple[Span, ...],
    device: torch.device,
    dtype: torch.dtype,
    reach: Reach | None = None,
) -> AttentionPlan:
    """Choose and lay out attention for one row on one device.

    Args:
        spans: The row's examples.
        device: Where queries, keys and values live.
        dtype: Their dtype.
        reach: Whom a query sees among what precedes it; ``None`` for all of it.

    Returns:
        On the CPU `TiledAttention` in bf16, `SegmentAttention` otherwise; on CUDA
        `VarlenAttention` where it is proven on this device, `DenseAttention` otherwise and for a
        reach that is no `Window`. Which one was taken and why is logged once.
    """
    # A plan made while scoring a reference under inference mode also serves the policy.
    with torch.inference_mode(False):
        if device.type == "cpu":
            tiled = dtype == torch.bfloat16
            _log_cpu_choice(tiled, dtype)
            if tiled:
                return TiledAttention(spans, dtype, reach)
            return SegmentAttention(spans, device, reach)
        if reach is None or isinstance(reach, Window):
            windowed = reach is not None
            if not varlen_refusal(device, dtype, windowed):
                return VarlenAttention(spans, device, dtype, reach)
        return DenseAttention(spans, device, reach)


@lru_cache
def _log_cpu_choice(tiled: bool, dtype: torch.dtype) -> None:
    if tiled:
        log.info("attention on cpu: batched tiles")
    else:
        log.info("attention on cpu: SDPA per example, as tiles only pay in bf16, not %s", dtype)
