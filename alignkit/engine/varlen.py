"""Compute attention over a packed row on CUDA, with PyTorch's kernel for rows of segments.

Shape letters: T row tokens, H query heads, K key heads, D head width.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cached_property, lru_cache
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn import functional as F

from alignkit.batch import Span
from alignkit.engine.segments import AttentionPlan, DenseAttention, Window, query_segments
from alignkit.utils.autocast import HALF

log = logging.getLogger(__name__)


class VarlenAttention:
    """Compute attention on CUDA in bf16 or fp16, by ``varlen_attn`` over segments.

    The kernel is ``torch.nn.attention.varlen.varlen_attn``. Every prompt and every response is one
    query segment. A response's keys are its prompt's followed by its own, gathered once a layer.
    Causality must be aligned to the bottom right, which `varlen_refusal` tests on the device first.

    Args:
        spans: The row's examples.
        device: Where queries, keys and values live.
        dtype: Of the products. Under autocast the rotary embeddings of an fp32 model return fp32
            queries and keys. Autocast rounds these for SDPA but not for this kernel.
        window: Which earlier tokens a query sees; ``None`` for all of them. A segment's keys lie in
            the order of their positions, so that the kernel's own windows are right.
    """

    def __init__(
        self,
        spans: Sequence[Span],
        device: torch.device,
        dtype: torch.dtype,
        window: Window | None = None,
    ) -> None:
        self.spans, self.device, self.dtype, self.window = tuple(spans), device, dtype, window
        segments = [segment for span in spans for segment in query_segments(span)]
        query_lengths = [length for _, length in segments]
        key_lengths = [sum(len(part) for part in keys) for keys, _ in segments]
        gather = [index for keys, _ in segments for part in keys for index in part]

        def to_device(values: Sequence[int], dtype: torch.dtype) -> Tensor:
            return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)

        self.cu_queries = to_device([0, *accumulate(query_lengths)], torch.int32)
        self.cu_keys = to_device([0, *accumulate(key_lengths)], torch.int32)
        self.max_query, self.max_key = max(query_lengths), max(key_lengths)
        # Where no prompt is shared the keys already lie in order, and nothing is gathered.
        self.gather = to_device(gather, torch.int64) if len(gather) != sum(query_lengths) else None

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, dropout: float
    ) -> Tensor:
        """Compute attention with one call, or by `DenseAttention` for dropout."""
        from torch.nn.attention.varlen import varlen_attn

        if dropout > 0.0:
            _log_dropout()
            return self._dense(query, key, value, scaling, dropout)
        if scaling is None:
            scaling = query.shape[-1] ** -0.5
        width = max(query.shape[-1], value.shape[-1])
        query_THD, key_THD, value_THD = (
            _pad_heads(tensor, width)[0].transpose(0, 1).to(self.dtype)
            for tensor in (query, key, value)
        )
        if self.gather is not None:
            key_THD, value_THD = key_THD[self.gather], value_THD[self.gather]
        groups = query.shape[1] // key.shape[1]
        if groups > 1:  # torch 2.11's kernel takes equal head counts only
            key_THD = key_THD.repeat_interleave(groups, dim=1)
            value_THD = value_THD.repeat_interleave(groups, dim=1)
        # Without `return_aux` the kernel returns the output alone.
        output: Tensor = varlen_attn(  # type: ignore[assignment]
            query_THD.contiguous(),
            key_THD.contiguous(),
            value_THD.contiguous(),
            self.cu_queries,
            self.cu_keys,
            self.max_query,
            self.max_key,
            scale=scaling,
            window_size=(-1 if self.window is None else self.window.size - 1, 0),
        )
        return output[..., : value.shape[-1]].transpose(0, 1)[None]

    @cached_property
    def _dense(self) -> DenseAttention:
        return DenseAttention(self.spans, self.device, self.window)


def _pad_heads(tensor: Tensor, width: int) -> Tensor:
    """Add zeros to heads, up to the one width that the kernel takes.

    Zeros in queries and keys change no score. Those in values are cut off the output again.
    """
    missing = width - tensor.shape[-1]
    return F.pad(tensor, (0, missing)) if missing else tensor


@lru_cache
def _log_dropout() -> None:
    log.warning("attention with dropout: dense [T, T] mask, because varlen_attn has no dropout")


@lru_cache
def varlen_refusal(device: torch.device, dtype: torch.dtype, windowed: bool = False) -> str | None:
    """Return why ``varlen_attn`` is not used on this device with this dtype; ``None`` where it is.

    The self-test runs once a device and dtype, and once more for windows. A small row with shared
    prompts and several responses must give the dense mask's output and gradients. It does not if
    causality is aligned to the top left.
    """
    refusal = _varlen_self_test(device, dtype, windowed)
    which = " with windows" if windowed else ""
    if refusal:
        log.warning("attention%s on %s: dense [T, T] mask, because %s", which, device, refusal)
    else:
        log.info("attention%s on %s: varlen_attn, self-test passed", which, device)
    return refusal


def _varlen_self_test(device: torch.device, dtype: torch.dtype, windowed: bool) -> str | None:
    if device.type != "cuda":
        return f"varlen_attn needs CUDA, not {device.type}"
    if dtype not in HALF:
        return f"varlen_attn needs bf16 or fp16, not {dtype}"
    return compare_with_dense(device, dtype, Window(7) if windowed else None)


def compare_with_dense(
    device: torch.device, dtype: torch.dtype, window: Window | None = None
) -> str | None:
    """Run the kernel and the dense mask on one small row, and return how they differ, if they do.

    The row has shared prompts, several responses and grouped queries.
    """
    spans = (Span(0, 17, (9, 5, 3)), Span(34, 0, (21,)), Span(55, 30, (4,)))
    generator = torch.Generator().manual_seed(0)
    width = (spans[-1].end, 64)
    query, key, value, grad = (
        torch.randn(1, heads, *width, generator=generator).to(device, dtype).requires_grad_()
        for heads in (4, 2, 2, 4)
    )
    results: list[list[Tensor]] = []
    try:
        plans: list[AttentionPlan] = [
            DenseAttention(spans, device, window),
            VarlenAttention(spans, device, dtype, window),
        ]
        for plan in plans:
            output = plan(query, key, value, None, 0.0)
            gradients = torch.autograd.grad(output, (query, key, value), grad)
            results.append([output.detach(), *gradients])
    except (ImportError, RuntimeError, TypeError, ValueError) as error:
        return f"varlen_attn failed its self-test ({type(error).__name__}: {error})"
    difference = max(
        (dense - varlen).abs().max().item() for dense, varlen in zip(*results, strict=True)
    )
    # Outputs and gradients are of order 1. Half-precision rounding stays well below this limit, and
    # a wrong alignment is far above it.
    return f"its self-test is off by {difference:.2g}" if difference > 0.1 else None
