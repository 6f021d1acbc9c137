"""Choose how a packed row attends on a device, for a dtype and for a layer's reach."""

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
from alignkit.utils.real import on_real_tensors

log = logging.getLogger(__name__)


# Policy and reference score the same row, and a model's layers may differ in their windows. The
# cache lays out each of these plans once.
@lru_cache(maxsize=4)
@on_real_tensors
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
        reach: Which earlier tokens a query sees; ``None`` for all of them.

    Returns:
        On the CPU `TiledAttention` in bf16 and `SegmentAttention` otherwise. On CUDA
        `VarlenAttention` where its self-test passed on this device and the reach is a `Window`
        or ``None``, and `DenseAttention` otherwise. The choice and its reason are logged once.
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
