"""Attention alone, on rows of real lengths: one kernel over segments, a dense mask, FlexAttention.

``padded`` is what libraries do that pad: a rectangle of sequences, each with its own copy of the
prompt, by causal SDPA without a mask, which is padding's cheapest case.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from alignkit.batch import Span
from alignkit.engine import Example, collate
from alignkit.engine.segments import DenseAttention, row_segments
from alignkit.engine.varlen import VarlenAttention, varlen_refusal
from gpuday import bare
from gpuday.clock import interleaved, peak_above
from gpuday.day import Day

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
Ways = dict[str, Callable[[], Attend | None]]
_DTYPE = torch.bfloat16


def measure(day: Day) -> None:
    """Note each way's time and memory, forward and backward, and how far it is from the mask's."""
    device = torch.device(day.device)
    refusals = {w: varlen_refusal(device, _DTYPE, w) for w in (False, True)}
    for windowed, why in refusals.items():
        name = "varlen self-test" + (" with windows" if windowed else "")
        day.note(name, "refused" if why else "passed", "", reason=why)
    shape = day.sizes.shapes[0]
    examples = bare.steps_of(day, "dpo", shape, 1)[0]
    spans = collate(examples).spans
    eager: Ways = {  # the mask first: the others are held against it
        "dense": lambda: _dense(spans, device),
        "varlen": lambda: _varlen(day, spans),
    }
    truths = {size: _compare(day, eager, examples, *size) for size in day.sizes.heads}
    for size, truth in truths.items():  # last, as it is compiled for each
        _compare(day, {"flex": lambda: _flex(spans, device)}, examples, *size, truth)


def _compare(
    day: Day,
    ways: Ways,
    examples: list[Example],
    heads: int,
    width: int,
    truth: list[Tensor] | None = None,
) -> list[Tensor] | None:
    tokens = sum(example.num_tokens for example in examples)
    about = {"heads": heads, "width": width, "row_tokens": tokens, "pairs": len(examples)}
    arms: dict[str, Callable[[], object]] = {}
    for name, make in ways.items():
        label = f"{name}, {heads}x{width}"
        try:
            attend = make()
            if attend is None:
                continue
            work = _Both(attend, (1, heads, tokens, width), day.device)
            results = work()
            if name == "dense":
                truth = results
            elif truth is not None:
                error = max((a - b).abs().max().item() for a, b in zip(results, truth, strict=True))
                day.note(f"{label}: error", error, "", against="dense", **about)
            work()
            day.note(f"{label}: peak", peak_above(work, day.device) / 2**20, "MiB", **about)
            arms[label] = work
        except Exception as error:  # one way's failure leaves the others to be measured
            day.note(f"{label}: failed", f"{type(error).__name__}: {error}"[:500], "", **about)
    longest = max(len(e.prompt) + len(r) for e in examples for r in e.responses)
    sequences = sum(len(e.responses) for e in examples)
    if "dense" in ways:
        padded = _Both(_causal, (sequences, heads, longest, width), day.device)
        padded()
        arms[f"padded, {heads}x{width}"] = padded
    found = interleaved(arms, 5, day.sizes.repeats, day.device, day.is_late)
    for label, times in found.items():
        day.note(
            f"{label}: time",
            1e3 * median(times),
            "ms",
            rounds=[1e3 * t for t in times],
            passes="forward and backward",
            padded=[sequences, longest],
            **about,
        )
    return truth


class _Both:
    """A forward and a backward pass, of one way to attend."""

    def __init__(self, attend: Attend, shape: tuple[int, ...], device: str) -> None:
        generator = torch.Generator(device).manual_seed(0)
        # Laid out as projections leave them: [batch, T, H, D], seen as [batch, H, T, D].
        batch, heads, tokens, width = shape
        self.attend = attend
        self.inputs = [
            torch.randn(batch, tokens, heads, width, generator=generator, device=device)
            .to(_DTYPE)
            .transpose(1, 2)
            for _ in range(4)
        ]
        self.grad = self.inputs.pop()
        for tensor in self.inputs:
            tensor.requires_grad_()

    def __call__(self) -> list[Tensor]:
        output = self.attend(*self.inputs)
        gradients: list[Tensor] = [*torch.autograd.grad(output, self.inputs, self.grad)]
        return [output.detach(), *gradients]


def _varlen(day: Day, spans: tuple[Span, ...]) -> Attend | None:
    if day.device != "cuda":
        return None
    plan = VarlenAttention(spans, torch.device(day.device), _DTYPE)
    return lambda q, k, v: plan(q, k, v, None, 0.0)


def _dense(spans: tuple[Span, ...], device: torch.device) -> Attend:
    plan = DenseAttention(spans, device)
    return lambda q, k, v: plan(q, k, v, None, 0.0)


def _flex(spans: tuple[Span, ...], device: torch.device) -> Attend | None:
    if device.type != "cuda":
        return None  # it has no backward pass on a CPU
    segment_T = row_segments(spans).to(device)
    lengths = torch.tensor([span.end - span.start for span in spans])
    example_T = torch.arange(len(spans)).repeat_interleave(lengths).to(device)

    def sees(_: Tensor, __: Tensor, query: Tensor, key: Tensor) -> Tensor:
        same = (segment_T[key] == 0) | (segment_T[key] == segment_T[query])
        return (key <= query) & (example_T[key] == example_T[query]) & same

    tokens = len(segment_T)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mask = create_block_mask(sees, None, None, tokens, tokens, device=str(device))
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: compiled(q, k, v, block_mask=mask)


def _causal(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, is_causal=True)
