"""Stand for linear layers in 4 and 8 bits: tensors of the right sizes, without bitsandbytes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from alignkit.models.quantize import Int8Linear, NF4Linear, PackedLinear
from alignkit.utils.autocast import compute_dtype

_BLOCK, _OUTER_BLOCK = 64, 256


class SizedInt8(Int8Linear):
    """Take the memory of an `Int8Linear`, whose own forward pass it runs."""

    @staticmethod
    def pack(weight_OI: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return tensors of the sizes that packing would give."""
        return weight_OI.new_empty(weight_OI.shape, dtype=torch.int8), {
            "scale": weight_OI.new_empty(len(weight_OI))
        }


class SizedNF4(NF4Linear):
    """Take the memory of an `NF4Linear`, unpacked for the moment of each product."""

    @staticmethod
    def pack(weight_OI: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return tensors of the sizes that packing would give."""
        blocks = -(-weight_OI.numel() // _BLOCK)
        return weight_OI.new_empty(-(-weight_OI.numel() // 2), 1, dtype=torch.uint8), {
            "absmax": weight_OI.new_empty(blocks, dtype=torch.uint8),
            "outer_absmax": weight_OI.new_empty(-(-blocks // _OUTER_BLOCK)),
            "offset": weight_OI.new_empty(()),
            "code": weight_OI.new_empty(16),
            "outer_code": weight_OI.new_empty(256),
        }

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to [..., I]; returns [..., O]."""
        x = x.to(compute_dtype(x.device.type, x.dtype))
        product: Tensor = _Unpacked.apply(x, self)  # type: ignore[no-untyped-call]
        return product if self.bias is None else product + self.bias.to(x.dtype)


SIZED: dict[str, type[PackedLinear]] = {"nf4": SizedNF4, "int8": SizedInt8}


class _Unpacked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: SizedNF4) -> Tensor:
        ctx.layer = layer
        return functional.linear(x, _unpacked(layer, x))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ _unpacked(ctx.layer, grad), None


def _unpacked(layer: SizedNF4, like: Tensor) -> Tensor:
    scales = like.new_empty(layer.absmax.shape, dtype=torch.float32)
    weight_OI = like.new_empty(layer.out_features, layer.in_features)
    del scales  # they were there while the weight was being written
    return weight_OI
