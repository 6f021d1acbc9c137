"""The lean product against plain autograd of its formula."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from alignkit.lora import LoRAConfig, LoRALinear, inject_lora
from alignkit.lora.matmul import adapted_linear


def inputs(
    rows: tuple[int, ...], i: int, o: int, r: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, ...]:
    """x, W, bias in ``dtype``; A, B in fp32 (fp64 for fp64)."""
    torch.manual_seed(seed)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return (
        torch.randn(*rows, i, dtype=dtype, requires_grad=True),
        torch.randn(i, o).to(dtype) / i**0.5,
        torch.randn(o).to(dtype),
        torch.randn(i, r, dtype=wide, requires_grad=True),
        torch.randn(r, o, dtype=wide, requires_grad=True),
    )


def plain(x: Tensor, w: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
    y = x @ w + scale * (x @ a @ b)
    return y if bias is None else y + bias


@settings(deadline=None, max_examples=40)
@given(
    rows=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    i=st.integers(1, 9),
    o=st.integers(1, 9),
    r=st.integers(1, 4),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_equals_the_formula_in_fp32(
    rows: list[int], i: int, o: int, r: int, bias: bool, seed: int
) -> None:
    x, w, c, a, b = inputs(tuple(rows), i, o, r, seed=seed)
    bias_O = c if bias else None
    ours, theirs = adapted_linear(x, w, bias_O, a, b, 0.7), plain(x, w, bias_O, a, b, 0.7)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    g = torch.randn_like(ours)
    for mine, reference in zip(
        torch.autograd.grad(ours, (x, a, b), g),
        torch.autograd.grad(theirs, (x, a, b), g),
        strict=True,
    ):
        torch.testing.assert_close(mine, reference, rtol=1e-5, atol=1e-5)


def test_gradients_by_finite_differences() -> None:
    x, w, c, a, b = inputs((2, 3), 4, 5, 2, torch.float64)
    c.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, c, a, b: adapted_linear(x, w, c, a, b, 1.5), (x, c, a, b)
    )


def test_bf16_is_as_near_the_truth_as_autocast() -> None:
    """Against fp64 of the same bf16 values: output and gradients no worse than plain autograd."""
    x, w, c, a, b = inputs((512,), 64, 96, 8, torch.bfloat16)
    truth_in = [t.detach().double().requires_grad_() for t in (x, w, c, a, b)]
    truth = plain(*truth_in, 2.0)
    g = torch.randn(512, 96).bfloat16()
    want = torch.autograd.grad(truth, (truth_in[0], truth_in[3], truth_in[4]), g.double())
    ours = adapted_linear(x, w, c, a, b, 2.0)
    got = torch.autograd.grad(ours, (x, a, b), g)
    rough = plain(x, w, c, a.bfloat16(), b.bfloat16(), 2.0)
    rough_got = torch.autograd.grad(rough, (x, a, b), g)
    assert ours.dtype == got[0].dtype == torch.bfloat16
    assert got[1].dtype == got[2].dtype == torch.float32
    pairs = zip((ours, *got), (rough, *rough_got), (truth, *want), strict=True)
    for mine, theirs, exact in pairs:
        error = (mine.double() - exact).norm() / exact.norm()
        assert error <= 1.05 * (theirs.double() - exact).norm() / exact.norm()
        assert error < 5e-3


def test_a_fresh_adapter_leaves_the_bits_alone() -> None:
    """B = 0: the output is the base's, bit for bit, in bf16 too."""
    for base in (nn.Linear(16, 24), Conv1D(24, 16)):
        base = base.bfloat16()
        x = torch.randn(5, 16).bfloat16()
        want = base(x)
        assert torch.equal(LoRALinear(base)(x), want)


@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16])
def test_autocast(base_dtype: torch.dtype) -> None:
    """Under autocast the layer computes in bf16 and gradients come back in each tensor's dtype."""
    layer = LoRALinear(nn.Linear(16, 24).to(base_dtype))
    nn.init.normal_(layer.adapters["default"].lora_B)
    x = torch.randn(5, 16, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
        want = (
            layer.base(x)
            + 2 * (x @ layer.adapters["default"].lora_A) @ layer.adapters["default"].lora_B
        )
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), want.float(), rtol=3e-2, atol=3e-2)
    y.float().sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32
    assert layer.adapters["default"].lora_A.grad.dtype == torch.float32


def test_keeps_x_in_its_own_dtype_and_one_thin_projection() -> None:
    """Saved for backward: W, A, B, x (bf16, not a copy) and x A; no fp32 copy of x."""
    x, w, c, a, b = inputs((32,), 16, 24, 4, torch.bfloat16)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        adapted_linear(x, w, c, a, b, 1.0)
    mine = {t.data_ptr() for t in (x, w, a, b)}
    extra = [t for t in saved if t.data_ptr() not in mine]
    assert x.data_ptr() in {t.data_ptr() for t in saved}
    assert [(tuple(t.shape), t.dtype) for t in extra] == [((4, 32), torch.bfloat16)]


def test_a_frozen_adapter_keeps_nothing() -> None:
    x, w, c, a, b = inputs((32,), 16, 24, 4)
    a, b = a.detach(), b.detach()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = adapted_linear(x, w, c, a, b, 1.0)
    assert {t.data_ptr() for t in saved} == {t.data_ptr() for t in (w, a, b)}
    (grad,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(grad, (w + a @ b).sum(1).expand(32, 16))


def test_used_twice_adds_both_gradients() -> None:
    layer = LoRALinear(nn.Linear(6, 6))
    adapter = layer.adapters["default"]
    nn.init.normal_(adapter.lora_B)
    x = torch.randn(3, 6)
    layer(layer(x)).sum().backward()
    got = adapter.lora_A.grad.clone()
    weight = layer.base.weight.t() + 2 * adapter.lora_A @ adapter.lora_B
    adapter.lora_A.grad = None
    ((x @ weight + layer.base.bias) @ weight + layer.base.bias).sum().backward()
    torch.testing.assert_close(got, adapter.lora_A.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reentrant", [True, False])
def test_under_activation_checkpointing(reentrant: bool) -> None:
    layer = LoRALinear(nn.Linear(6, 6))
    nn.init.normal_(layer.adapters["default"].lora_B)
    x = torch.randn(3, 6, requires_grad=True)
    layer(x).pow(2).sum().backward()
    want = layer.adapters["default"].lora_B.grad.clone()
    layer.zero_grad()
    checkpoint(layer, x, use_reentrant=reentrant).pow(2).sum().backward()
    assert torch.equal(layer.adapters["default"].lora_B.grad, want)


# Dynamo itself instantiates every autograd.Function it traces.
@pytest.mark.filterwarnings("ignore:.*Function.*should not be instantiated:DeprecationWarning")
def test_traces_whole_under_compile() -> None:
    """No graph break in forward or backward; ``aot_eager`` traces both without a C++ compiler."""
    layer = LoRALinear(nn.Linear(6, 6))
    nn.init.normal_(layer.adapters["default"].lora_B)
    x = torch.randn(3, 6, requires_grad=True)
    layer(x).pow(2).sum().backward()
    want = (x.grad.clone(), layer.adapters["default"].lora_A.grad.clone())
    x.grad = None
    layer.zero_grad()
    torch.compile(layer, backend="aot_eager", fullgraph=True)(x).pow(2).sum().backward()
    torch.testing.assert_close((x.grad, layer.adapters["default"].lora_A.grad), want)


def test_no_gradient_below_the_lowest_adapted_layer(
    tiny_model: Callable[..., PreTrainedModel], ids: Tensor
) -> None:
    model = inject_lora(tiny_model("gpt2"), LoRAConfig(layers="1"))
    seen: dict[int, bool] = {}
    for index, block in enumerate(model.transformer.h):
        block.register_forward_hook(
            lambda _, __, out, index=index: seen.update({index: out.requires_grad})
        )
    model(ids)
    assert seen == {0: False, 1: True}


def test_equals_the_general_path_in_a_model(
    tiny_model: Callable[..., PreTrainedModel],
    shake: Callable[..., nn.Module],
    ids: Tensor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lean = shake(inject_lora(tiny_model("gpt2"), LoRAConfig(targets="all-linear")))
    general = copy.deepcopy(lean)
    lean(ids, labels=ids).loss.backward()
    monkeypatch.setattr("alignkit.lora.layer.adapted_linear", plain)
    general(ids, labels=ids).loss.backward()
    for mine, theirs in zip(lean.parameters(), general.parameters(), strict=True):
        if mine.grad is not None:
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-6)
