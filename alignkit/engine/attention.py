"""Attention over a packed row, for any transformers model that uses ``AttentionInterface``.

The function registered as ``alignkit`` is transformers' own SDPA until a forward call carries a
``plan``; generation, evaluation with padded batches and everything else is therefore unchanged.
With a plan, a token attends to its own prompt and to what precedes it in its own response.

Shape letters: T row tokens, H query heads, K key heads, D head width.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from alignkit.engine.batch import Span
from alignkit.errors import AlignkitError

IMPLEMENTATION = "alignkit"
log = logging.getLogger(__name__)

# Attention variants that change who sees whom or how scores are formed; a packed row would be
# silently wrong under them.
_UNSUPPORTED = ("sliding_window", "softcap", "position_bias", "s_aux")


class AttentionPlan(Protocol):
    """How one row attends; made once a batch, used by every layer."""

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, dropout: float
    ) -> Tensor:
        """Attend [1, H, T, D] queries to [1, K, T, D] keys and values; returns [1, H, T, D]."""


class SegmentAttention:
    """One SDPA call an example: the CPU path.

    An example with one response is plain causal attention. With k ≥ 2 responses a boolean mask
    hides the siblings: one call over prompt and responses beats one call a segment, whose keys
    would have to be copied next to the prompt's.
    """

    def __init__(self, spans: Sequence[Span], device: torch.device) -> None:
        self.lengths = [span.end - span.start for span in spans]
        self.masks = [
            None if len(span.responses) == 1 else example_mask(span).to(device) for span in spans
        ]

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, dropout: float
    ) -> Tensor:
        # split, not slicing: its backward concatenates once, a slice's zero-fills the whole row.
        parts = zip(
            query.split(self.lengths, dim=2),
            key.split(self.lengths, dim=2),
            value.split(self.lengths, dim=2),
            self.masks,
            strict=True,
        )
        outputs = [
            F.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=mask,
                dropout_p=dropout,
                is_causal=mask is None,
                scale=scaling,
                enable_gqa=q.shape[1] != k.shape[1],
            )
            for q, k, v, mask in parts
        ]
        return torch.cat(outputs, dim=2)


class DenseAttention:
    """One SDPA call with a [T, T] mask: right everywhere, quadratic in the row."""

    def __init__(self, spans: Sequence[Span], device: torch.device) -> None:
        blocks = [example_mask(span) for span in spans]
        self.mask_TT = torch.block_diag(*blocks).bool().to(device, non_blocking=True)

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, dropout: float
    ) -> Tensor:
        groups = query.shape[1] // key.shape[1]
        if groups > 1:
            # Masked SDPA on CUDA has no grouped-query kernel; copies cost less than its fallback.
            key = key.repeat_interleave(groups, dim=1)
            value = value.repeat_interleave(groups, dim=1)
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=self.mask_TT, dropout_p=dropout, scale=scaling
        )


class VarlenAttention:
    """``torch.nn.attention.varlen.varlen_attn`` over segments: the CUDA bf16/fp16 path.

    Every prompt and every response is one query segment; a response's keys are its prompt's
    followed by its own, gathered once a layer. Causality is aligned to the bottom right, which
    `varlen_refusal` proves on the device before this path is taken.
    """

    def __init__(self, spans: Sequence[Span], device: torch.device) -> None:
        segments = [segment for span in spans for segment in query_segments(span)]
        query_lengths = [length for _, length in segments]
        key_lengths = [sum(len(part) for part in keys) for keys, _ in segments]
        gather = [index for keys, _ in segments for part in keys for index in part]

        def to_device(values: Sequence[int], dtype: torch.dtype) -> Tensor:
            return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)

        self.cu_queries = to_device([0, *accumulate(query_lengths)], torch.int32)
        self.cu_keys = to_device([0, *accumulate(key_lengths)], torch.int32)
        self.max_query, self.max_key = max(query_lengths), max(key_lengths)
        # Where nothing is shared the keys already lie in order and nothing is gathered.
        self.gather = to_device(gather, torch.int64) if len(gather) != sum(query_lengths) else None

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, dropout: float
    ) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn

        if dropout > 0.0:
            raise AlignkitError(
                "varlen attention has no dropout; set the model's attention dropout to 0"
            )
        key_THD, value_THD = key[0].transpose(0, 1), value[0].transpose(0, 1)
        if self.gather is not None:
            key_THD, value_THD = key_THD[self.gather], value_THD[self.gather]
        groups = query.shape[1] // key.shape[1]
        if groups > 1:  # torch 2.11's kernel takes equal head counts only
            key_THD = key_THD.repeat_interleave(groups, dim=1)
            value_THD = value_THD.repeat_interleave(groups, dim=1)
        output = varlen_attn(
            query[0].transpose(0, 1).contiguous(),
            key_THD.contiguous(),
            value_THD.contiguous(),
            self.cu_queries,
            self.cu_keys,
            self.max_query,
            self.max_key,
            scale=scaling,
            window_size=(-1, 0),
        )
        return output.transpose(0, 1)[None]


def query_segments(span: Span) -> list[tuple[tuple[range, ...], int]]:
    """The causal segments of one example: (key ranges in the row, number of queries) each.

    The queries are the last rows of the keys. One response makes one segment together with its
    prompt; k ≥ 2 make the prompt's segment and one a response, over the prompt and itself.
    """
    if len(span.responses) == 1:
        return [((range(span.start, span.end),), span.end - span.start)]
    prompt = range(span.start, span.start + span.prompt)
    segments: list[tuple[tuple[range, ...], int]] = [((prompt,), span.prompt)] if prompt else []
    first = prompt.stop
    for length in span.responses:
        segments.append(((prompt, range(first, first + length)), length))
        first += length
    return segments


def example_mask(span: Span) -> Tensor:
    """[L, L] bool on the CPU: may query i see key j, within one example of L tokens."""
    length = span.end - span.start
    mask_LL = torch.zeros(length, length, dtype=torch.bool)
    for keys, count in query_segments(span):
        columns = torch.cat([torch.arange(part.start, part.stop) for part in keys]) - span.start
        rows = columns[-count:]
        mask_LL[rows[:, None], columns] = (
            torch.ones(count, len(columns)).tril(len(columns) - count).bool()
        )
    return mask_LL


def make_plan(spans: Sequence[Span], device: torch.device, dtype: torch.dtype) -> AttentionPlan:
    """Choose and lay out attention for one row on one device.

    Args:
        spans: The row's examples.
        device: Where queries, keys and values live.
        dtype: Their dtype; half precisions may take the fused CUDA kernel.

    Returns:
        `SegmentAttention` on the CPU, `VarlenAttention` on CUDA where it is proven on this
        device, `DenseAttention` otherwise. Which one was taken and why is logged once.
    """
    if device.type == "cpu":
        return SegmentAttention(spans, device)
    refusal = varlen_refusal(device, dtype)
    return DenseAttention(spans, device) if refusal else VarlenAttention(spans, device)


@lru_cache
def varlen_refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why ``varlen_attn`` is not used on this device with this dtype; ``None`` where it is.

    Runs once a device and dtype: a small row with shared prompts and several responses must give
    the dense mask's output and gradients, which fails if causality is aligned to the top left.
    """
    refusal = _varlen_self_test(device, dtype)
    if refusal:
        log.warning("attention on %s: dense [T, T] mask, because %s", device, refusal)
    else:
        log.info("attention on %s: varlen_attn, self-test passed", device)
    return refusal


def _varlen_self_test(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cuda":
        return f"varlen_attn needs CUDA, not {device.type}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"varlen_attn needs bf16 or fp16, not {dtype}"
    spans = (Span(0, 17, (9, 5, 3)), Span(34, 0, (21,)), Span(55, 30, (4,)))
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(4, 1, 2, spans[-1].end, 64, generator=generator).to(device, dtype)
    results = []
    try:
        for plan in (DenseAttention(spans, device), VarlenAttention(spans, device)):
            inputs = [row.clone().requires_grad_() for row in rows[:3]]
            output = plan(*inputs, None, 0.0)
            gradients = torch.autograd.grad(output, inputs, rows[3])
            results.append(torch.stack([output.detach(), *gradients]).float())
    except (ImportError, RuntimeError, TypeError, ValueError) as error:
        return f"varlen_attn failed its self-test ({type(error).__name__}: {error})"
    difference = (results[0] - results[1]).abs().max().item()
    # Half-precision rounding of outputs and gradients of order 1 stays well below this; a wrong
    # alignment is off by the order of 1.
    return f"its self-test is off by {difference:.2g}" if difference > 0.1 else None


def packed_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    plan: AttentionPlan | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The ``AttentionInterface`` function: SDPA as transformers calls it, or a packed row.

    Args:
        module: The calling attention layer.
        query: [1, H, T, D]; key and value: [1, K, T, D].
        attention_mask: Ignored with a plan.
        scaling: Factor on the scores; ``None`` for 1/√D.
        dropout: Probability on the attention weights.
        plan: From `make_plan`; travels as a keyword of the model's forward.
        **kwargs: What else the model hands its attention.

    Returns:
        [1, T, H, D] attention output, and ``None`` for the weights.

    Raises:
        AlignkitError: The model uses an attention variant that a packed row does not express.
    """
    if plan is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    for name in _UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise AlignkitError(
                f"model: {type(module).__name__} uses {name}, which packed rows do not support; "
                "use a model with plain causal attention"
            )
    return plan(query, key, value, scaling, dropout).transpose(1, 2).contiguous(), None


def use_packed_attention(model: PreTrainedModel) -> None:
    """Route the model's attention through `packed_attention_forward`; a no-op the second time.

    Raises:
        AlignkitError: The model's class does not go through ``AttentionInterface``.
    """
    if model.config._attn_implementation == IMPLEMENTATION:
        return
    model.set_attn_implementation(IMPLEMENTATION)
    if model.config._attn_implementation != IMPLEMENTATION:
        raise AlignkitError(
            f"model: {type(model).__name__} does not support transformers' AttentionInterface; "
            "use a gpt2, gpt_neox or llama-like model"
        )


AttentionInterface.register(IMPLEMENTATION, packed_attention_forward)
# With the mask function registered, forwards without a plan get SDPA's masks; a forward with a
# plan passes a 4-D placeholder, which transformers hands on untouched.
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
