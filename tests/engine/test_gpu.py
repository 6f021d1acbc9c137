"""On a GPU: attention, scores and memory of the engine, against plain forwards in fp32."""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from alignkit.batch import Span
from alignkit.engine import Example, collate, score
from alignkit.engine.attention import make_plan
from alignkit.engine.explicit import ExplicitAttention
from alignkit.engine.head import CHUNK, token_scores
from alignkit.engine.segments import DenseAttention, SegmentAttention, Window
from alignkit.engine.varlen import VarlenAttention

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
CPU = torch.device("cpu")
BF16 = torch.bfloat16
# Shared prompts, an empty one, one response and three; longer than a block of the kernel's.
SPANS = (
    Span(0, 200, (150, 30)),
    Span(380, 0, (300,)),
    Span(680, 20, (9,)),
    Span(709, 70, (5, 1, 64)),
)


def qkv(heads: int, key_heads: int, width: int) -> list[Tensor]:
    """Queries, keys, values and the output's gradient, fp32 values that bf16 holds exactly."""
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(1, count, SPANS[-1].end, width, generator=generator).to(BF16).float()
        for count in (heads, key_heads, key_heads, heads)
    ]


def attend(plan: Callable[..., Tensor], tensors: list[Tensor], *more: object) -> list[Tensor]:
    """Output and gradients, in fp32 on the CPU."""
    *inputs, grad = tensors
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    output = plan(*leaves, None, 0.0, *more)
    gradients = torch.autograd.grad(output, leaves, grad)
    return [tensor.detach().float().cpu() for tensor in (output, *gradients)]


def assert_near(actual: list[Tensor], expected: list[Tensor]) -> None:
    """As near as bf16 sums of hundreds of terms are."""
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=0.05, rtol=0.05)
        assert (ours - theirs).abs().mean() < 0.005


@pytest.mark.parametrize("window", [None, Window(16)], ids=["all", "window"])
@pytest.mark.parametrize(("heads", "key_heads", "width"), [(4, 4, 64), (4, 2, 128), (2, 2, 40)])
@pytest.mark.parametrize("plan", [VarlenAttention, DenseAttention])
def test_bf16_attention_equals_the_cpu_in_fp32(
    plan: type, heads: int, key_heads: int, width: int, window: Window | None
) -> None:
    tensors = qkv(heads, key_heads, width)
    expected = attend(SegmentAttention(SPANS, CPU, window), tensors)
    made = plan(SPANS, CUDA, BF16, window) if plan is VarlenAttention else plan(SPANS, CUDA, window)
    assert_near(attend(made, [tensor.to(CUDA, BF16) for tensor in tensors]), expected)


def test_explicit_attention_equals_the_cpu_in_fp32() -> None:
    """Soft-capped scores with sinks, whose gradients go through a recomputation."""
    tensors, sinks_H = qkv(4, 2, 64), torch.tensor([0.0, 1.0, -2.0, 3.0])
    expected = attend(ExplicitAttention(SPANS, CPU), tensors, 20.0, sinks_H)
    on_gpu = [tensor.to(CUDA, BF16) for tensor in tensors]
    actual = attend(ExplicitAttention(SPANS, CUDA), on_gpu, 20.0, sinks_H.to(CUDA))
    assert_near(actual, expected)


def test_training_takes_the_kernel() -> None:
    for window in (None, Window(16)):
        assert isinstance(make_plan(SPANS, CUDA, BF16, window), VarlenAttention)
    assert isinstance(make_plan(SPANS, CUDA, torch.float32), DenseAttention)


def examples(count: int) -> list[Example]:
    """Prompts with three responses or one, and documents without a prompt."""
    draw = random.Random(0)

    def ids(low: int, high: int) -> list[int]:
        return [draw.randrange(1, 384) for _ in range(draw.randint(low, high))]

    made = [Example(ids(1, 60), [ids(1, 40) for _ in range(1 + 2 * (i % 2))]) for i in range(count)]
    return [*made, Example([], [ids(2, 100)])]


def plain_scores(model: PreTrainedModel, batch: list[Example]) -> Tensor:
    """Log-probs by the model as transformers made it, one sequence a forward."""
    parts = []
    for example in batch:
        for response in example.responses:
            row = torch.tensor([[*example.prompt, *response]], device=model.device)
            logp_LV = model(input_ids=row).logits[0, :-1].float().log_softmax(-1)
            logp_L = logp_LV.gather(1, row[0, 1:, None])[:, 0]
            parts.append(logp_L[max(len(example.prompt) - 1, 0) :])
    return torch.cat(parts)


def test_bf16_scores_are_as_near_to_fp32_as_a_plain_forward(
    tiny_model: Callable[..., PreTrainedModel], family: str
) -> None:
    model, batch = tiny_model(family), examples(8)
    stock = copy.deepcopy(model)
    with torch.no_grad():
        truth = plain_scores(stock, batch)
        plain = plain_scores(stock.to(CUDA, BF16), batch).cpu()
        packed = score(model.to(CUDA, BF16), collate(batch).to(CUDA)).cpu()
    error = (packed - truth).abs().mean()
    assert error <= 1.5 * (plain - truth).abs().mean() + 1e-3
    assert (packed - truth).abs().max() < 1.0  # a token that sees too much is off by nats


def test_fp32_scores_equal_a_plain_forward(
    tiny_model: Callable[..., PreTrainedModel], family: str
) -> None:
    model, batch = tiny_model(family).to(CUDA), examples(8)
    stock = copy.deepcopy(model)
    with torch.no_grad():
        torch.testing.assert_close(
            score(model, collate(batch).to(CUDA)), plain_scores(stock, batch), atol=1e-4, rtol=1e-4
        )


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_the_head_keeps_no_logits(trained: bool) -> None:
    """Peak memory over 2N scored tokens exceeds that over N by far less than N rows of logits."""
    vocabulary, width, count = 65536, 64, 8 * CHUNK
    head = nn.Linear(width, vocabulary, bias=False, device=CUDA, dtype=BF16).requires_grad_(trained)
    peaks = []
    for tokens in (count, count, 2 * count):  # the first call fills the pools of the libraries
        hidden_ND = torch.randn(tokens, width, device=CUDA, dtype=BF16, requires_grad=True)
        target_N = torch.randint(vocabulary, (tokens,), device=CUDA)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        token_scores(head, hidden_ND, target_N).logps.sum().backward()
        torch.cuda.synchronize()
        peaks.append(torch.cuda.max_memory_allocated() - before)
    logits = count * vocabulary * 2
    assert peaks[2] - peaks[1] < logits / 8
    assert peaks[2] < 2 * logits  # those of its tokens alone, without softmax or gradient


def test_memory_grows_with_the_row_and_not_with_its_square(
    tiny_model: Callable[..., PreTrainedModel],
) -> None:
    """Twice the tokens of like examples take about twice the memory."""
    model = tiny_model("llama").to(CUDA, BF16)
    peaks = []
    for count in (64, 64, 128):
        batch = collate(list(itertools.islice(itertools.cycle(examples(8)), count))).to(CUDA)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        score(model, batch).sum().backward()
        torch.cuda.synchronize()
        peaks.append(torch.cuda.max_memory_allocated() - before)
        model.zero_grad()
    assert peaks[2] < 2.5 * peaks[1]
