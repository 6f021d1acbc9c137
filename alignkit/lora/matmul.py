"""Compute LoRA's matrix product as one autograd node, without dropout and without DoRA.

Plain autograd of ``x W + s x A B`` keeps more than it needs and adds the two input gradients in a
pass of their own. Here the low-rank product is accumulated into the base product in place, in both
directions, and only ``x`` (in its own dtype) and the thin projection ``x A`` are kept: R/I of x's
size, so that recomputing it in backward would save next to nothing and cost a pass over x.

The thin products are taken with the rank as rows, [R, T], and before the wide ones: on CPU that is
up to a third faster than [T, R] for ranks of 8 to 16, and leaves x and g warm in the cache.

Shape letters: T rows (all leading axes of x), I input width, O output width, R rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from alignkit.utils.autocast import HALF, compute_dtype, no_autocast


def adapted_linear(
    x: Tensor, weight_IO: Tensor, bias_O: Tensor | None, a_IR: Tensor, b_RO: Tensor, scale: float
) -> Tensor:
    """Compute ``x W + bias + scale · x A B``, W frozen.

    Under autocast everything is computed in autocast's dtype, as `torch.nn.functional.linear`
    would; otherwise in ``x``'s, to which A and B are rounded for the products.

    Args:
        x: [..., I].
        weight_IO: [I, O], frozen; a transposed view will do.
        bias_O: [O] or ``None``.
        a_IR: [I, R] fp32.
        b_RO: [R, O] fp32.
        scale: Multiplies the low-rank product.

    Returns:
        [..., O] in the dtype of the computation. Gradients of A, B and the bias come in the dtype
        of A, B and the bias.
    """
    x = x.to(compute_dtype(x.device.type, x.dtype))
    result: Tensor = _AdaptedLinear.apply(  # type: ignore[no-untyped-call]
        x, weight_IO, bias_O, a_IR, b_RO, scale
    )
    return result


class _AdaptedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight_IO: Tensor,
        bias_O: Tensor | None,
        a_IR: Tensor,
        b_RO: Tensor,
        scale: float,
    ) -> Tensor:
        device, dtype = x.device.type, x.dtype
        ctx.autocast = torch.is_autocast_enabled(device)
        x_TI = x.reshape(-1, x.shape[-1])
        with no_autocast(device):
            z_RT = torch.mm(_rows(a_IR, dtype), x_TI.t())
            # Frozen fp32 weights are cast again in backward rather than kept twice.
            weight = weight_IO.to(dtype) if ctx.autocast else weight_IO
            if bias_O is None:
                y_TO = torch.mm(x_TI, weight)
            else:
                y_TO = torch.addmm(bias_O.to(dtype), x_TI, weight)
            y_TO.addmm_(z_RT.t(), (b_RO * scale).to(dtype))
        trains = ctx.needs_input_grad[3] or ctx.needs_input_grad[4]
        ctx.save_for_backward(weight_IO, a_IR, b_RO, *((x_TI, z_RT) if trains else ()))
        ctx.scale, ctx.dtype, ctx.shape = scale, dtype, x.shape
        ctx.bias_dtype = None if bias_O is None else bias_O.dtype
        # No view, as models may edit it in place (Falcon adds to it, Llama 4 scales queries).
        result: Tensor = torch.ops.aten._unsafe_view(y_TO, [*x.shape[:-1], y_TO.shape[-1]])
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight_IO, a_IR, b_RO, *kept = ctx.saved_tensors
        needs_x, _, needs_bias, needs_a, needs_b, _ = ctx.needs_input_grad
        dtype = ctx.dtype
        grad_x = grad_a = grad_b = grad_bias = None
        with no_autocast(grad.device.type):
            g_TO = grad.reshape(-1, grad.shape[-1])
            if needs_b:
                grad_b = _wide_mm(kept[1], g_TO).to(b_RO.dtype) * ctx.scale
            if needs_x or needs_a:
                gz_RT = torch.mm((b_RO * ctx.scale).to(dtype), g_TO.t())
            if needs_a:
                grad_a = _wide_mm(gz_RT, kept[0]).to(a_IR.dtype).t()
            if needs_x:
                weight = weight_IO.to(dtype) if ctx.autocast else weight_IO
                grad_x = torch.mm(g_TO, weight.t())
                grad_x = grad_x.addmm_(gz_RT.t(), _rows(a_IR, dtype)).view(ctx.shape)
            if needs_bias:
                grad_bias = g_TO.sum(0, dtype=ctx.bias_dtype)
        return grad_x, None, grad_bias, grad_a, grad_b, None


def _rows(a_IR: Tensor, dtype: torch.dtype) -> Tensor:
    """Return A as contiguous rows [R, I]: the thin product then reads both sides in order."""
    return a_IR.t().to(dtype, memory_format=torch.contiguous_format)


def _wide_mm(left: Tensor, right: Tensor) -> Tensor:
    """Multiply half-precision matrices without rounding the sum, where the device can."""
    if left.is_cuda and left.dtype in HALF:
        return torch.mm(left, right, out_dtype=torch.float32)
    return torch.mm(left, right)
