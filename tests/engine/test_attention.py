"""Every attention plan against one dense mask written out by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from alignkit.engine.attention import (
    DenseAttention,
    SegmentAttention,
    VarlenAttention,
    example_mask,
    query_segments,
    varlen_refusal,
)
from alignkit.engine.batch import Span

SPANS = (Span(0, 3, (2, 4)), Span(9, 0, (5,)), Span(14, 2, (3,)), Span(19, 4, (1, 2, 3)))
CPU = torch.device("cpu")


def test_example_mask_by_hand() -> None:
    """Prompt a b, responses c d and e: d sees a b c d, e sees a b e."""
    expected = [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 0, 0, 1],
    ]
    assert example_mask(Span(100, 2, (2, 1))).int().tolist() == expected


def test_segments_cover_every_query_once() -> None:
    for span in SPANS:
        queries = [list(r) for keys, count in query_segments(span) for r in [keys[-1][-count:]]]
        assert sorted(sum(queries, [])) == list(range(span.start, span.end))


def qkv(device: str = "cpu", dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    total = SPANS[-1].end
    return [
        torch.randn(1, heads, total, 16, generator=generator).to(device, dtype).requires_grad_()
        for heads in (4, 2, 2)
    ]


@pytest.mark.parametrize("plan_class", [SegmentAttention, DenseAttention])
def test_plans_agree_with_softmax_of_masked_scores(plan_class: type) -> None:
    """Values and gradients, with grouped queries, against softmax(q kᵀ / √D + mask) v."""
    query, key, value = inputs = qkv()
    mask = torch.block_diag(*[example_mask(span) for span in SPANS]).bool()
    keys, values = (t.repeat_interleave(2, dim=1) for t in (key, value))
    scores = (query @ keys.transpose(-1, -2) / 4).masked_fill(~mask, float("-inf"))
    expected = scores.softmax(-1) @ values
    actual = plan_class(SPANS, CPU)(query, key, value, None, 0.0)
    torch.testing.assert_close(actual, expected, atol=1e-6, rtol=1e-5)
    weights = torch.randn_like(expected)
    for a, e in zip(
        torch.autograd.grad(actual, inputs, weights),
        torch.autograd.grad(expected, inputs, weights),
        strict=True,
    ):
        torch.testing.assert_close(a, e, atol=1e-5, rtol=1e-5)


def test_varlen_layout() -> None:
    """The gathered keys and offsets describe the same mask, read as bottom-right causality."""
    plan = VarlenAttention(SPANS, CPU)
    assert plan.gather is not None
    total = SPANS[-1].end
    mask = torch.zeros(total, total, dtype=torch.bool)
    bounds = zip(plan.cu_queries.tolist(), plan.cu_keys.tolist(), strict=True)
    starts = list(bounds)
    for (q0, k0), (q1, k1) in zip(starts, starts[1:], strict=False):
        for offset, row in enumerate(range(q0, q1)):
            visible = plan.gather[k0 : k1 - (q1 - q0) + offset + 1]
            mask[row, visible] = True
    assert torch.equal(mask, torch.block_diag(*[example_mask(span) for span in SPANS]).bool())


def test_varlen_is_refused_with_a_reason_off_cuda() -> None:
    assert "CUDA" in str(varlen_refusal(CPU, torch.bfloat16))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_varlen_passes_its_self_test_on_cuda() -> None:
    assert varlen_refusal(torch.device("cuda"), torch.bfloat16) is None
