"""Compute bf16 attention over a packed row on the CPU, by batched matmuls over equal tiles.

SDPA's CPU kernel multiplies small blocks one head at a time and its backward pass is several times
slower than its forward. Here the queries of each example are cut into tiles of at most `QUERIES`
rows, each with the keys it may see (its prompt and its own responses, up to its last row). Tiles
are padded to multiples of `UNIT`, gathered into stacks of equal shape and attended to by batched
matmuls; scores and softmax are fp32. The backward pass computes the scores again, so that
queries, keys and values are all that is kept.

Shape letters: T row tokens, H query heads, K key heads, D width of queries and keys, V of values;
S tiles of a stack, n its queries, m its keys; X gathered rows (tiles x heads x rows of a tile).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from alignkit.batch import Span
from alignkit.engine.onednn import fp32_products
from alignkit.engine.segments import (
    Reach,
    SegmentAttention,
    Window,
    query_segments,
    row_positions,
    row_segments,
    visible,
)
from alignkit.utils.autocast import no_autocast
from alignkit.utils.real import on_real_tensors

QUERIES = 128
"""Rows of a tile. Shorter ones waste less above the diagonal, longer ones pay fewer calls."""
UNIT = 16
"""Tiles are padded to multiples of it: few shapes, for each of which oneDNN compiles a kernel."""
SCORES = 2**17
"""Scores of one head that exist at once: what stays in the caches, and small in memory."""


@dataclass(frozen=True)
class _Stack:
    """Hold tiles of one shape.

    Attributes:
        queries_Sn: Row of each query; padding repeats the tile's last.
        keys_Sm: Row of each key, padded likewise.
        real_Sn: Which queries are no padding.
        mask_S1nm: fp32, 0 where the query sees the key and -inf where not.
    """

    queries_Sn: Tensor
    keys_Sm: Tensor
    real_Sn: Tensor
    mask_S1nm: Tensor


@dataclass(frozen=True)
class _Gather:
    """Hold where each stack's rows lie among a layer's [T·H, D] queries and [T·K, D] keys.

    Attributes:
        stacks: In the order of the gathered rows.
        queries_X, keys_X: Which row to fetch.
        outputs: [T·H], where each query went.
        padding: Gathered query rows that are padding.
    """

    stacks: list[_Stack]
    queries_X: Tensor
    keys_X: Tensor
    outputs: Tensor
    padding: Tensor


class TiledAttention:
    """Compute attention on the CPU in bf16, by batches of tiles of equal shape.

    Attention dropout, which nothing here needs, is left to `SegmentAttention`.

    Args:
        spans: The row's examples.
        dtype: Of the products; under autocast the queries may come in another.
        reach: Whom a query sees among what precedes it; ``None`` for all of it.
    """

    def __init__(
        self, spans: Sequence[Span], dtype: torch.dtype, reach: Reach | None = None
    ) -> None:
        self.spans = spans
        self.dtype = dtype
        self.reach = reach
        segment_T = row_segments(spans)
        position_T = None if reach is None else row_positions(spans)
        shapes: dict[tuple[int, int], list[tuple[range, list[int]]]] = defaultdict(list)
        for span in spans:
            for queries, keys in _tiles(span):
                if isinstance(reach, Window) and position_T is not None:
                    keys = _within(reach, position_T, queries, keys)
                shapes[_padded(len(queries)), _padded(len(keys))].append((queries, keys))
        self.stacks = [
            _stack(tiles[start : start + size], n, m, segment_T, reach, position_T)
            for (n, m), tiles in sorted(shapes.items())
            for size in [max(1, SCORES // (n * m))]
            for start in range(0, len(tiles), size)
        ]
        self.gathers: dict[tuple[int, int], _Gather] = {}

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, dropout: float
    ) -> Tensor:
        """Compute attention with a few calls a stack of tiles."""
        if dropout > 0.0:
            plan = SegmentAttention(self.spans, query.device, self.reach)
            return plan(query, key, value, scaling, dropout)
        query, key, value = (tensor.to(self.dtype) for tensor in (query, key, value))
        heads = query.shape[1], key.shape[1]
        if heads not in self.gathers:
            self.gathers[heads] = _gather(self.stacks, *heads, rows=self.spans[-1].end)
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        output: Tensor = _Tiled.apply(  # type: ignore[no-untyped-call]
            query, key, value, scale, self.gathers[heads]
        )
        return output


def _tiles(span: Span) -> Iterator[tuple[range, list[int]]]:
    """Divide one example into (query rows, key rows); short neighbouring segments share a tile."""
    groups: list[range] = []
    for keys, count in query_segments(span):
        stop = keys[-1].stop
        if groups and stop - groups[-1].start <= QUERIES:
            groups[-1] = range(groups[-1].start, stop)
        else:
            groups.append(range(stop - count, stop))
    for group in groups:
        prompt = range(span.start, min(group.start, span.start + span.prompt))
        longest = min(QUERIES, max(UNIT, SCORES // (len(prompt) + len(group))))
        tiles = -(-len(group) // longest)
        size = _padded(-(-len(group) // tiles))
        for start in range(group.start, group.stop, size):
            stop = min(start + size, group.stop)
            yield range(start, stop), [*prompt, *range(group.start, stop)]


def _padded(count: int) -> int:
    return -(-count // UNIT) * UNIT


def _within(window: Window, position_T: Tensor, queries: range, keys: list[int]) -> list[int]:
    """Exclude the keys that lie before the window of every query of a tile."""
    first = int(position_T[queries.start : queries.stop].min()) - window.size
    index = torch.tensor(keys)
    return index[position_T[index] > first].tolist()


def _stack(
    tiles: Sequence[tuple[range, list[int]]],
    n: int,
    m: int,
    segment_T: Tensor,
    reach: Reach | None,
    position_T: Tensor | None,
) -> _Stack:
    queries_Sn = torch.tensor([[*q, *[q[-1]] * (n - len(q))] for q, _ in tiles])
    keys_Sm = torch.tensor([[*k, *[k[-1]] * (m - len(k))] for _, k in tiles])
    real_Sn = torch.arange(n) < torch.tensor([[len(q)] for q, _ in tiles])
    real_Sm = torch.arange(m) < torch.tensor([[len(k)] for _, k in tiles])
    seen_Snm = visible(segment_T, queries_Sn[:, :, None], keys_Sm[:, None]) & real_Sm[:, None]
    if reach is not None and position_T is not None:
        seen_Snm &= reach(position_T[queries_Sn][:, :, None], position_T[keys_Sm][:, None])
    mask_Snm = torch.zeros(seen_Snm.shape).masked_fill_(~seen_Snm, float("-inf"))
    return _Stack(queries_Sn, keys_Sm, real_Sn, mask_Snm[:, None])


@on_real_tensors
def _gather(stacks: list[_Stack], heads: int, key_heads: int, rows: int) -> _Gather:
    def by_head(rows_Sn: Tensor, count: int) -> Tensor:
        return (rows_Sn[:, None] * count + torch.arange(count)[:, None]).flatten()

    queries_X = torch.cat([by_head(stack.queries_Sn, heads) for stack in stacks])
    keys_X = torch.cat([by_head(stack.keys_Sm, key_heads) for stack in stacks])
    real_X = torch.cat([stack.real_Sn[:, None].expand(-1, heads, -1).flatten() for stack in stacks])
    taken = real_X.nonzero()[:, 0]
    outputs = torch.empty(rows * heads, dtype=torch.int64)
    outputs[queries_X[taken]] = taken
    return _Gather(stacks, queries_X, keys_X, outputs, (~real_X).nonzero()[:, 0])


class _Tiled(torch.autograd.Function):
    """Compute softmax(s q kᵀ + mask) v, and its gradient from q, k and v alone."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float, gather: _Gather
    ) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.scale, ctx.gather = scale, gather
        query_XD = _take(query, gather.queries_X)
        key_XD, value_XV = (_take(tensor, gather.keys_X) for tensor in (key, value))
        output_XV = query_XD.new_empty(len(query_XD), value.shape[-1])
        with _fp32_scores(query.dtype):
            for stack, (q, out), (k, v) in _by_stack(
                gather, key.shape[1], (query_XD, output_XV), (key_XD, value_XV)
            ):
                torch.bmm(_probabilities(q, k, scale, stack).to(v.dtype), v, out=out)
        return _give(output_XV.index_select(0, gather.outputs), query.shape[1], query.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value = ctx.saved_tensors
        gather: _Gather = ctx.gather
        query_XD, grad_XV = (_take(tensor, gather.queries_X) for tensor in (query, grad))
        key_XD, value_XV = (_take(tensor, gather.keys_X) for tensor in (key, value))
        grad_XV.index_fill_(0, gather.padding, 0.0)
        grads = [torch.empty_like(tensor) for tensor in (query_XD, key_XD, value_XV)]
        with _fp32_scores(query.dtype):
            for stack, (q, g, grad_q), (k, v, grad_k, grad_v) in _by_stack(
                gather,
                key.shape[1],
                (query_XD, grad_XV, grads[0]),
                (key_XD, value_XV, *grads[1:]),
            ):
                p = _probabilities(q, k, ctx.scale, stack)
                torch.bmm(p.to(v.dtype).transpose(1, 2), g, out=grad_v)
                grad_p = torch.bmm(g.float(), v.float().transpose(1, 2))
                # p ∘ (∂p − Σ p ∂p), in one pass.
                grad_s = torch._softmax_backward_data(grad_p, p, -1, torch.float32).to(v.dtype)
                torch.bmm(grad_s, k, out=grad_q)
                torch.bmm(grad_s.transpose(1, 2), q, out=grad_k)
        grad_query = grads[0].index_select(0, gather.outputs).mul_(ctx.scale)
        # A key is seen by several tiles: their parts are added in fp32.
        grad_key, grad_value = (
            tensor.new_zeros(
                key.shape[1] * key.shape[2], tensor.shape[1], dtype=torch.float32
            ).index_add_(0, gather.keys_X, tensor.float())
            for tensor in grads[1:]
        )
        return (
            _give(grad_query, query.shape[1], query.dtype),
            _give(grad_key.mul_(ctx.scale), key.shape[1], key.dtype),
            _give(grad_value, value.shape[1], value.dtype),
            None,
            None,
        )


def _take(tensor: Tensor, index_X: Tensor) -> Tensor:
    """Take rows of a [1, H, T, D] tensor, seen as [T·H, D] as the projections lay it out."""
    return tensor[0].transpose(0, 1).reshape(-1, tensor.shape[-1]).index_select(0, index_X)


def _give(rows: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    """Turn [T·H, D] back into [1, H, T, D]."""
    return rows.to(dtype).view(1, -1, heads, rows.shape[1]).transpose(1, 2)


def _by_stack(
    gather: _Gather,
    key_heads: int,
    query_side: tuple[Tensor, ...],
    key_side: tuple[Tensor, ...],
) -> Iterator[tuple[_Stack, list[Tensor], list[Tensor]]]:
    """Yield each stack with its part of the tensors: [S·K, H/K·n, D] by query, [S·K, m, D] by key.

    Queries of heads that share a key head follow one another, so grouped queries need no copies
    of their keys.
    """
    q = k = 0
    heads = len(gather.queries_X) // sum(stack.queries_Sn.numel() for stack in gather.stacks)
    for stack in gather.stacks:
        batch = len(stack.queries_Sn) * key_heads
        q_end = q + stack.queries_Sn.numel() * heads
        k_end = k + stack.keys_Sm.numel() * key_heads
        yield (
            stack,
            [tensor[q:q_end].view(batch, -1, tensor.shape[1]) for tensor in query_side],
            [tensor[k:k_end].view(batch, -1, tensor.shape[1]) for tensor in key_side],
        )
        q, k = q_end, k_end


def _probabilities(q: Tensor, k: Tensor, scale: float, stack: _Stack) -> Tensor:
    """Compute softmax(s q kᵀ + mask) in fp32, [S·K, H/K·n, m]."""
    scores = torch.bmm(q.float(), k.float().transpose(1, 2))
    S, _, n, m = stack.mask_S1nm.shape
    scores_SHnm = scores.view(S, -1, n, m)
    torch.add(stack.mask_S1nm, scores_SHnm, alpha=scale, out=scores_SHnm)
    return scores.softmax(-1)


@contextmanager
def _fp32_scores(dtype: torch.dtype) -> Iterator[None]:
    with fp32_products(dtype), no_autocast("cpu"):
        yield
