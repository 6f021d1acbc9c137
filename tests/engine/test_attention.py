"""Every attention plan against one dense mask written out by hand."""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.attention.varlen
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel

from alignkit.batch import Span
from alignkit.engine import Example, check_engine, collate, score
from alignkit.engine.attention import make_plan
from alignkit.engine.segments import (
    AttentionPlan,
    DenseAttention,
    Reach,
    SegmentAttention,
    Window,
    example_mask,
    query_segments,
)
from alignkit.engine.tiles import TiledAttention
from alignkit.engine.varlen import VarlenAttention, compare_with_dense, varlen_refusal

SPANS = (Span(0, 3, (2, 4)), Span(9, 0, (5,)), Span(14, 2, (3,)), Span(19, 4, (1, 2, 3)))
# Longer than a tile: prompts and responses cut into several, others sharing one.
LONG = (Span(0, 200, (150, 30, 20)), Span(400, 0, (300,)), Span(700, 20, (9, 7)))
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
        queries = [row for keys, count in query_segments(span) for row in keys[-1][-count:]]
        assert sorted(queries) == list(range(span.start, span.end))


def qkv(
    spans: tuple[Span, ...], dtype: torch.dtype = torch.float32, values: int = 16
) -> list[Tensor]:
    """Four heads of queries, two of keys and values; values may have another width."""
    generator = torch.Generator().manual_seed(0)
    return [
        (2 * torch.randn(1, heads, spans[-1].end, width, generator=generator))
        .to(dtype)
        .requires_grad_()
        for heads, width in ((4, 16), (2, 16), (2, values))
    ]


def values_and_gradients(output: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    grads = torch.autograd.grad(output, inputs, weights.to(output.dtype))
    return [output.detach(), *grads]


def softmax_of_masked_scores(
    spans: tuple[Span, ...], inputs: list[Tensor], reach: Reach | None = None
) -> list[Tensor]:
    """softmax(q kᵀ / √D + mask) v over the whole row in float64, D = 16."""
    query, key, value = inputs = [t.detach().double().requires_grad_() for t in inputs]
    mask = torch.block_diag(*[example_mask(span, reach) for span in spans]).bool()
    keys, values = (t.repeat_interleave(2, dim=1) for t in (key, value))
    scores = (query @ keys.transpose(-1, -2) / 4).masked_fill(~mask, float("-inf"))
    return values_and_gradients(scores.softmax(-1) @ values, inputs)


PLANS: dict[str, Callable[[tuple[Span, ...], Reach | None], AttentionPlan]] = {
    "segment": lambda spans, reach: SegmentAttention(spans, CPU, reach),
    "dense": lambda spans, reach: DenseAttention(spans, CPU, reach),
    "tiled": lambda spans, reach: TiledAttention(spans, torch.float32, reach),
}


def test_a_window_by_hand() -> None:
    """Prompt a b c, responses d e and f, a window of three: e sees c d e, f sees b c f."""
    expected = [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [0, 1, 1, 1, 0, 0],
        [0, 0, 1, 1, 1, 0],
        [0, 1, 1, 0, 0, 1],
    ]
    assert example_mask(Span(100, 3, (2, 1)), Window(3)).int().tolist() == expected


@pytest.mark.parametrize("values", [16, 10, 24], ids=lambda width: f"values of {width}")
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("spans", [SPANS, LONG], ids=["short", "long"])
def test_plans_agree_with_softmax_of_masked_scores(
    plan: str, spans: tuple[Span, ...], values: int
) -> None:
    """Values and gradients, with grouped queries and values of another width than theirs.

    Scores reach 26, so fp32 rounds their exponentials by some 2e-6, and values reach 9.
    """
    inputs = qkv(spans, values=values)
    actual = values_and_gradients(PLANS[plan](spans, None)(*inputs, None, 0.0), inputs)
    for a, e in zip(actual, softmax_of_masked_scores(spans, inputs), strict=True):
        torch.testing.assert_close(a, e.float(), atol=4e-5, rtol=1e-5)


def chunks_of_50(query_position: Tensor, key_position: Tensor) -> Tensor:
    return query_position // 50 == key_position // 50


@pytest.mark.parametrize("reach", [Window(1), Window(3), Window(70), chunks_of_50])
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("spans", [SPANS, LONG], ids=["short", "long"])
def test_plans_reach_as_far_as_a_layer(plan: str, spans: tuple[Span, ...], reach: Reach) -> None:
    """Windows shorter and longer than prompts, responses and tiles; and what is no window."""
    inputs = qkv(spans)
    actual = values_and_gradients(PLANS[plan](spans, reach)(*inputs, None, 0.0), inputs)
    for a, e in zip(actual, softmax_of_masked_scores(spans, inputs, reach), strict=True):
        torch.testing.assert_close(a, e.float(), atol=4e-5, rtol=1e-5)


def test_tiles_take_no_keys_from_before_a_window() -> None:
    """A row of 2,000 tokens with a window of 100: a tile of 128 queries has at most 228 keys."""
    spans = (Span(0, 1200, (500, 300)),)

    def most_keys(reach: Reach | None) -> int:
        stacks = TiledAttention(spans, torch.bfloat16, reach).stacks
        return max(stack.keys_Sm.shape[1] for stack in stacks)

    assert most_keys(Window(100)) <= 240 < most_keys(None)


@pytest.mark.parametrize(("values", "gradients"), [(16, 1.05), (10, 1.6)])
def test_tiles_in_bf16_are_as_near_the_truth_as_sdpa(values: int, gradients: float) -> None:
    """Root mean square error against float64, of values and of each gradient.

    Values get a margin: SDPA rounds weights to bf16 before they are normalised, where each row's
    largest, 1, is exact. So do gradients with values of another width: SDPA has no fused kernel
    for these and keeps fp32 throughout.
    """
    inputs = qkv(LONG, torch.bfloat16, values)
    truth = softmax_of_masked_scores(LONG, inputs)

    def errors(plan: AttentionPlan) -> list[float]:
        actual = values_and_gradients(plan(*inputs, None, 0.0), inputs)
        return [(a - t).square().mean().sqrt().item() for a, t in zip(actual, truth, strict=True)]

    tiled = errors(TiledAttention(LONG, torch.bfloat16))
    sdpa = errors(SegmentAttention(LONG, CPU))
    for ours, theirs, margin in zip(tiled, sdpa, (1.5, *[gradients] * 3), strict=True):
        assert ours <= margin * theirs


def test_tiles_keep_queries_keys_and_values_alone() -> None:
    """What stays for the backward pass is q, k and v: not the output, not the scores."""
    inputs = qkv(LONG, torch.bfloat16)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        TiledAttention(LONG, torch.bfloat16)(*inputs, None, 0.0)
    assert sum(t.numel() for t in kept) == sum(t.numel() for t in inputs)


def test_tiles_leave_dropout_to_sdpa() -> None:
    inputs = qkv(SPANS)
    outputs = []
    for plan in (TiledAttention(SPANS, torch.float32), SegmentAttention(SPANS, CPU)):
        torch.manual_seed(0)
        outputs.append(plan(*inputs, None, 0.5))
    assert torch.equal(*outputs)


def test_the_plan_follows_the_dtype_and_is_made_once() -> None:
    assert isinstance(make_plan(SPANS, CPU, torch.float32), SegmentAttention)
    plan = make_plan(SPANS, CPU, torch.bfloat16)
    assert isinstance(plan, TiledAttention)
    assert make_plan(tuple(SPANS), CPU, torch.bfloat16) is plan


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_plan_made_under_inference_mode_serves_training(
    tiny_model: Callable[..., PreTrainedModel], dtype: torch.dtype
) -> None:
    """A reference is scored first, under inference mode; the policy reuses its plan."""
    model = tiny_model("llama").to(dtype)
    batch = collate([Example([1, 2, 3], [[4, 5, 6], [7, 8]])])
    make_plan.cache_clear()
    with torch.inference_mode():
        reference = score(copy.deepcopy(model), batch)
    policy = score(model, batch)
    policy.sum().backward()
    assert torch.equal(policy.detach(), reference.clone())
    assert make_plan.cache_info().hits == 1


def test_autocast_takes_tiles_and_leaves_no_setting_behind(
    tiny_model: Callable[..., PreTrainedModel], family: str
) -> None:
    """fp32 weights under bf16 autocast: near fp32, and the matmul setting is put back."""
    model = tiny_model(family)
    batch = collate([Example(list(range(40)), [[4, 5, 6], [7, 8]])])
    before = torch.backends.mkldnn.matmul.fp32_precision
    expected = score(model, batch)
    with torch.autocast("cpu", torch.bfloat16):
        actual = score(model, batch)
        actual.sum().backward()
    assert torch.backends.mkldnn.matmul.fp32_precision == before
    assert (actual - expected).abs().mean() < 0.1


def test_varlen_layout() -> None:
    """The gathered keys and offsets describe the same mask, read as bottom-right causality."""
    plan = VarlenAttention(SPANS, CPU, torch.bfloat16)
    assert plan.gather is not None
    total = SPANS[-1].end
    mask = torch.zeros(total, total, dtype=torch.bool)
    bounds = zip(plan.cu_queries.tolist(), plan.cu_keys.tolist(), strict=True)
    for (q0, k0), (q1, k1) in pairwise(bounds):
        for offset, row in enumerate(range(q0, q1)):
            visible = plan.gather[k0 : k1 - (q1 - q0) + offset + 1]
            mask[row, visible] = True
    assert torch.equal(mask, torch.block_diag(*[example_mask(span) for span in SPANS]).bool())


def emulated_varlen_attn(aligned: str) -> Callable[..., Tensor]:
    """The kernel's contract as torch documents it, a sequence at a time, on any device.

    Args:
        aligned: Where causality is aligned, ``right`` (the last query sees the last key) or
            ``left`` (the first query sees the first key alone).
    """
    signature = inspect.signature(torch.nn.attention.varlen.varlen_attn)

    def attend(*args: object, **kwargs: object) -> Tensor:
        call = signature.bind(*args, **kwargs)  # names and order are the installed torch's
        call.apply_defaults()
        given = call.arguments
        query, key, value = given["query"], given["key"], given["value"]
        assert query.shape[1:] == key.shape[1:] == value.shape[1:]  # one width, equal heads
        assert query.dtype == key.dtype == value.dtype
        assert query.is_contiguous() and key.is_contiguous() and value.is_contiguous()
        left, right = given["window_size"]
        assert right == 0
        bounds = [given[name].tolist() for name in ("cu_seq_q", "cu_seq_k")]
        longest = [max(b - a for a, b in pairwise(each)) for each in bounds]
        assert longest == [given["max_q"], given["max_k"]]
        outputs = []
        for (q0, q1), (k0, k1) in zip(*map(pairwise, bounds), strict=True):
            n, m = q1 - q0, k1 - k0
            last = m - n if aligned == "right" else 0
            mask = torch.ones(n, m).tril(last).bool()
            if left >= 0:
                mask &= torch.ones(n, m).triu(last - left).bool()
            q, k, v = (t.transpose(0, 1)[None] for t in (query[q0:q1], key[k0:k1], value[k0:k1]))
            part = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=given["scale"])
            outputs.append(part[0].transpose(0, 1))
        return torch.cat(outputs)

    return attend


@pytest.mark.parametrize("values", [16, 10, 24], ids=lambda width: f"values of {width}")
@pytest.mark.parametrize("scaling", [None, 0.2])
@pytest.mark.parametrize("spans", [SPANS, SPANS[1:2]], ids=["shared", "nothing shared"])
def test_varlen_calls_its_kernel_rightly(
    monkeypatch: pytest.MonkeyPatch, spans: tuple[Span, ...], scaling: float | None, values: int
) -> None:
    """Layout, keywords and grouped queries, against the kernel's documented contract."""
    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", emulated_varlen_attn("right"))
    spans = tuple(span._replace(start=span.start - spans[0].start) for span in spans)
    inputs = qkv(spans, values=values)
    plans = VarlenAttention(spans, CPU, torch.float32), DenseAttention(spans, CPU)
    actual, expected = (values_and_gradients(plan(*inputs, scaling, 0.0), inputs) for plan in plans)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("window", [Window(1), Window(3), Window(50)])
def test_varlen_leaves_windows_to_its_kernel(
    monkeypatch: pytest.MonkeyPatch, window: Window
) -> None:
    """A response's keys lie in the order of their positions, its prompt's first."""
    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", emulated_varlen_attn("right"))
    inputs = qkv(SPANS)
    plan = VarlenAttention(SPANS, CPU, torch.float32, window)
    actual = values_and_gradients(plan(*inputs, None, 0.0), inputs)
    for a, e in zip(actual, softmax_of_masked_scores(SPANS, inputs, window), strict=True):
        torch.testing.assert_close(a, e.float(), atol=4e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_varlen_gives_its_kernel_half_precision_under_autocast(
    tiny_model: Callable[..., PreTrainedModel],
    family: str,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rotary embeddings of an fp32 model make queries and keys fp32 even under autocast."""
    emulated = emulated_varlen_attn("right")
    dtypes = []

    def kernel(query: Tensor, *args: object, **kwargs: object) -> Tensor:
        dtypes.append(query.dtype)
        return emulated(query, *args, **kwargs)

    def choose(*, varlen: bool) -> None:
        def make(
            spans: tuple[Span, ...], device: torch.device, dtype: torch.dtype
        ) -> AttentionPlan:
            if varlen:
                return VarlenAttention(spans, device, dtype)
            return DenseAttention(spans, device)

        monkeypatch.setattr(sys.modules["alignkit.engine.score"], "make_plan", make)

    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", kernel)
    model = tiny_model(family).to(dtype)
    batch = collate([Example(list(range(40)), [[4, 5, 6], [7, 8]]), Example([3], [[1, 2]])])
    scores = []
    for varlen in (True, False):
        choose(varlen=varlen)
        with torch.autocast("cpu", torch.bfloat16):
            scores.append(score(model, batch))
        model.zero_grad()
        scores[-1].sum().backward()
        scores.append(next(model.parameters()).grad.norm())
    assert set(dtypes) == {torch.bfloat16}
    torch.testing.assert_close(scores[0], scores[2], atol=0.1, rtol=0.0)
    torch.testing.assert_close(scores[1], scores[3], atol=0.0, rtol=0.1)


def test_varlen_leaves_dropout_to_a_dense_mask_and_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    inputs = qkv(SPANS)
    outputs = []
    for plan in (VarlenAttention(SPANS, CPU, torch.float32), DenseAttention(SPANS, CPU)):
        torch.manual_seed(0)
        outputs.append(plan(*inputs, None, 0.5))
    assert torch.equal(*outputs)
    assert "varlen_attn has no dropout" in caplog.text


@pytest.mark.parametrize(("aligned", "passes"), [("right", True), ("left", False)])
def test_the_self_test_tells_alignments_apart(
    monkeypatch: pytest.MonkeyPatch, aligned: str, passes: bool
) -> None:
    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", emulated_varlen_attn(aligned))
    for window in (None, Window(7)):
        refusal = compare_with_dense(CPU, torch.bfloat16, window)
        assert (refusal is None) is passes
        assert passes or "self-test is off" in str(refusal)


def test_the_self_test_reports_a_kernel_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> Tensor:
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", fail)
    assert "no kernel image" in str(compare_with_dense(CPU, torch.bfloat16))


def test_varlen_is_refused_with_a_reason_off_cuda() -> None:
    assert "CUDA" in str(varlen_refusal(CPU, torch.bfloat16))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_varlen_passes_its_self_test_on_cuda() -> None:
    assert varlen_refusal(torch.device("cuda"), torch.bfloat16) is None
    assert varlen_refusal(torch.device("cuda"), torch.bfloat16, windowed=True) is None


@pytest.mark.parametrize("kind", ["deepseek_v3+values", "minicpm3+values", "mimo_v2_flash"])
def test_models_with_values_of_another_width_take_tiles_in_bf16(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In packed rows, and no further from their fp32 scores than twice the model's own forward."""
    from tests.engine.families import tiny_family
    from tests.engine.test_families import EXAMPLES, plain_scores

    taken: list[str] = []
    for plan in (TiledAttention, SegmentAttention):
        monkeypatch.setattr(plan, "__call__", _noting(plan.__call__, plan.__name__, taken))
    model = tiny_family(kind).bfloat16()
    with torch.no_grad():
        truth = plain_scores(tiny_family(kind))
        own = plain_scores(model) - truth
        check_engine(model, "require")
        taken.clear()
        packed = score(model, collate(EXAMPLES)) - truth
    assert set(taken) == {"TiledAttention"}
    assert packed.abs().median() < 2 * own.abs().median()


def _noting(call: Any, name: str, taken: list[str]) -> Any:
    def noted(*args: Any, **kwargs: Any) -> Any:
        taken.append(name)
        return call(*args, **kwargs)

    return noted
