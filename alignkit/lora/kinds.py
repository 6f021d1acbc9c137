"""Tell which modules LoRA can adapt: linear layers, ``x Wᵀ + b``, and plain embeddings."""

from __future__ import annotations

import copy
from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D


class QuantizedLinear(nn.Linear):
    """Define a linear layer whose ``weight`` is quantized, and which computes its own product.

    Attributes:
        quantization: The quantized format, such as ``nf4``.
        dtype: The dtype of the weight that it stands for.
    """

    quantization: ClassVar[str]
    dtype: torch.dtype

    @abstractmethod
    def dequantized(self) -> Tensor:
        """Return the weight [O, I] that it stands for, in its dtype."""


_FAULTS = (RuntimeError, TypeError, ValueError, AttributeError, LookupError)
"""Errors of a forward pass that was written for other inputs; such a module is not linear."""


def is_linear(module: nn.Module) -> bool:
    """Tell whether a module computes ``x W + b`` and nothing else.

    `torch.nn.Linear` and transformers' ``Conv1D`` do. A subclass of either (FalconLinear) does if
    a test shows it: a router that returns a choice of experts beside its logits does not.
    """
    if type(module) in (nn.Linear, Conv1D) or isinstance(module, QuantizedLinear):
        return True
    return isinstance(module, (nn.Linear, Conv1D)) and _is_seen_linear(module)


def is_adaptable(module: nn.Module) -> bool:
    """Tell whether a module can be adapted by low rank: a linear layer or a plain embedding."""
    return type(module) is nn.Embedding or is_linear(module)


def weight_shape(module: nn.Module) -> tuple[int, ...]:
    """Return the shape of a module's weight, or of the one that a packed weight stands for."""
    if isinstance(module, QuantizedLinear):
        return module.out_features, module.in_features
    return tuple(module.get_parameter("weight").shape)


def stores_rows_of_outputs(module: nn.Module) -> bool:
    """Tell whether a linear layer's weight is [O, I], as `torch.nn.Linear` keeps it."""
    return isinstance(module, nn.Linear)


def _is_seen_linear(module: nn.Module) -> bool:
    """Compare the output of a small copy of a module with the matrix product it should be."""
    if set(module._parameters) - {"weight", "bias"} or module._buffers or module._modules:
        return False
    draw = torch.Generator().manual_seed(0)
    x_TI = torch.randn(2, 3, 5, generator=draw, device="cpu")
    weight_OI = torch.randn(7, 5, generator=draw, device="cpu")
    has_bias = module._parameters.get("bias") is not None
    bias_O = torch.randn(7, generator=draw, device="cpu") if has_bias else None
    twin = copy.copy(module)
    stored = weight_OI if stores_rows_of_outputs(module) else weight_OI.t()
    twin._parameters = {"weight": nn.Parameter(stored.contiguous())}
    twin._parameters["bias"] = None if bias_O is None else nn.Parameter(bias_O)
    for name, size in (("in_features", 5), ("out_features", 7), ("nx", 5), ("nf", 7)):
        if name in twin.__dict__:
            twin.__dict__[name] = size
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            found = twin.forward(x_TI)  # not the call: hooks are none of the formula
    except _FAULTS:
        return False
    wanted = functional.linear(x_TI, weight_OI, bias_O)
    same = isinstance(found, torch.Tensor) and found.shape == wanted.shape
    return same and torch.allclose(found, wanted, rtol=1e-5, atol=1e-5)
