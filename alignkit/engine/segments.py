"""Define which tokens a token of a packed row sees, and two plain ways to attend to them.

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

# Whether a query at one position sees a key at another. Both are tensors of positions, which
# broadcast. The rule is the layer's own mask of one sequence; it counts for earlier keys alone.
Reach: TypeAlias = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Window:
    """Restrict a token to itself and the ``size - 1`` before it: sliding-window attention.

    Example:
        >>> Window(2)(torch.tensor(5), torch.tensor([3, 4, 5])).tolist()
        [False, True, True]
    """

    size: int

    def __call__(self, query_position: Tensor, key_position: Tensor) -> Tensor:
        """Tell whether a query sees a key."""
        return query_position - key_position < self.size


def query_segments(span: Span) -> list[tuple[tuple[range, ...], int]]:
    """Return the causal segments of one example: (key ranges in the row, number of queries) each.

    The queries are the last rows of the keys. A single response makes one segment together with its
    prompt. With k ≥ 2 responses the prompt makes a segment, and each response makes one over the
    prompt and itself.

    Example:
        >>> query_segments(Span(start=0, prompt=2, responses=(2, 3)))
        [((range(0, 2),), 2), ((range(0, 2), range(2, 4)), 2), ((range(0, 2), range(4, 7)), 3)]
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
    """Return the response of each row token, [T] int64: 0 in a prompt, else 1, 2 and so on."""
    lengths = [length for span in spans for length in (span.prompt, *span.responses)]
    numbers = [k for span in spans for k in range(1 + len(span.responses))]
    return torch.tensor(numbers).repeat_interleave(torch.tensor(lengths))


def row_positions(spans: Sequence[Span]) -> Tensor:
    """Return each row token's position in its sequence, a response behind its prompt, [T] int64."""
    parts = [
        torch.arange(first, first + length)
        for span in spans
        for first, length in ((0, span.prompt), *((span.prompt, n) for n in span.responses))
    ]
    return torch.cat(parts)


def visible(segment_T: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
    """Tell whether a query sees a key of its example: an earlier one in its prompt or response.

    Args:
        segment_T: From `row_segments`.
        queries, keys: Indices into it; they broadcast.

    Returns:
        Bool of their broadcast shape.
    """
    key_segment = segment_T[keys]
    return (keys <= queries) & ((key_segment == 0) | (key_segment == segment_T[queries]))


def example_mask(span: Span, reach: Reach | None = None) -> Tensor:
    """Return whether query i sees key j of one example of L tokens, [L, L] bool on the CPU."""
    segment_L = row_segments([span])
    index_L = torch.arange(len(segment_L))
    seen_LL = visible(segment_L, index_L[:, None], index_L)
    if reach is None:
        return seen_LL
    position_L = row_positions([span])
    return seen_LL & reach(position_L[:, None], position_L)


class AttentionPlan(Protocol):
    """Compute attention over one row; a plan is made once a batch and used by every layer."""

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, dropout: float
    ) -> Tensor:
        """Compute [1, H, T, D] from [1, H, T, D] queries and [1, K, T, D] keys and values."""


class SegmentAttention:
    """Compute attention on the CPU with one SDPA call an example.

    An example with one response is plain causal attention, and so is one within a longer window.
    With k ≥ 2 responses a boolean mask hides the other responses. One call over prompt and
    responses is faster than one call a segment, which would copy the prompt's keys.
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
        """Compute attention with one call an example."""
        # The backward pass of a split concatenates once; that of a slice fills a row with zeros.
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
    """Compute attention with one SDPA call and a [T, T] mask, at a cost quadratic in the row."""

    def __init__(
        self, spans: Sequence[Span], device: torch.device, reach: Reach | None = None
    ) -> None:
        blocks = [example_mask(span, reach) for span in spans]
        mask_TT: Tensor = torch.block_diag(*blocks)  # type: ignore[no-untyped-call]
        self.mask_TT = mask_TT.bool().to(device, non_blocking=True)

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, dropout: float
    ) -> Tensor:
        """Compute attention with one call."""
        groups = query.shape[1] // key.shape[1]
        if groups > 1:
            # Masked SDPA on CUDA has no grouped-query kernel. Copies cost less than its fallback.
            key = key.repeat_interleave(groups, dim=1)
            value = value.repeat_interleave(groups, dim=1)
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=self.mask_TT, dropout_p=dropout, scale=scaling
        )
