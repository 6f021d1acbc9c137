"""What a token of a packed row sees, and the two plain ways to attend to it.

Shape letters: T row tokens, H query heads, K key heads, D head width, L tokens of an example.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from alignkit.batch import Span

# May a query at one position see a key at another, both tensors of positions that broadcast: what a
# layer's own mask says of one sequence, beyond "what precedes it".
Reach: TypeAlias = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Window:
    """The reach of sliding-window attention: a token sees itself and ``size - 1`` before it."""

    size: int

    def __call__(self, query_position: Tensor, key_position: Tensor) -> Tensor:
        """May a query see a key."""
        return query_position - key_position < self.size


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


def row_segments(spans: Sequence[Span]) -> Tensor:
    """Which response a row token belongs to, [T] int64: 0 for a prompt's, else 1, 2, … ."""
    lengths = [length for span in spans for length in (span.prompt, *span.responses)]
    numbers = [k for span in spans for k in range(1 + len(span.responses))]
    return torch.tensor(numbers).repeat_interleave(torch.tensor(lengths))


def row_positions(spans: Sequence[Span]) -> Tensor:
    """Position of each row token in its sequence, [T] int64: a response's follow its prompt's."""
    parts = [
        torch.arange(first, first + length)
        for span in spans
        for first, length in ((0, span.prompt), *((span.prompt, n) for n in span.responses))
    ]
    return torch.cat(parts)


def visible(segment_T: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
    """May a query see a key of its own example: what precedes it, in its prompt or its response.

    Args:
        segment_T: From `row_segments`.
        queries, keys: Indices into it; they broadcast.

    Returns:
        Bool of their broadcast shape.
    """
    key_segment = segment_T[keys]
    return (keys <= queries) & ((key_segment == 0) | (key_segment == segment_T[queries]))


def example_mask(span: Span, reach: Reach | None = None) -> Tensor:
    """[L, L] bool on the CPU: may query i see key j, within one example of L tokens."""
    segment_L = row_segments([span])
    index_L = torch.arange(len(segment_L))
    seen_LL = visible(segment_L, index_L[:, None], index_L)
    if reach is None:
        return seen_LL
    position_L = row_positions([span])
    return seen_LL & reach(position_L[:, None], position_L)


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
    would have to be copied next to the prompt's. A window that is longer than the example needs no
    mask either.
    """

    def __init__(
        self, spans: Sequence[Span], device: torch.device, reach: Reach | None = None
    ) -> None:
        self.lengths = [span.end - span.start for span in spans]
        self.masks = [
            None if _is_causal(span, reach) else example_mask(span, reach).to(device)
            for span in spans
        ]

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, dropout: float
    ) -> Tensor:
        """Attend, one call an example."""
        # split, not slicing: its backward concatenates once, a slice's zero-fills the whole row.
        parts = zip(
            torch.split(query, self.lengths, dim=2),
            torch.split(key, self.lengths, dim=2),
            torch.split(value, self.lengths, dim=2),
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


def _is_causal(span: Span, reach: Reach | None) -> bool:
    inside = reach is None or (isinstance(reach, Window) and reach.size >= span.end - span.start)
    return inside and len(span.responses) == 1


class DenseAttention:
    """One SDPA call with a [T, T] mask: right everywhere, quadratic in the row."""

    def __init__(
        self, spans: Sequence[Span], device: torch.device, reach: Reach | None = None
    ) -> None:
        blocks = [example_mask(span, reach) for span in spans]
        mask_TT: Tensor = torch.block_diag(*blocks)  # type: ignore[no-untyped-call]
        self.mask_TT = mask_TT.bool().to(device, non_blocking=True)

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, dropout: float
    ) -> Tensor:
        """Attend in one call."""
        groups = query.shape[1] // key.shape[1]
        if groups > 1:
            # Masked SDPA on CUDA has no grouped-query kernel; copies cost less than its fallback.
            key = key.repeat_interleave(groups, dim=1)
            value = value.repeat_interleave(groups, dim=1)
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=self.mask_TT, dropout_p=dropout, scale=scaling
        )
