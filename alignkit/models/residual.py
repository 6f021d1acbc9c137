"""Keep the residual stream of a half-precision model in fp32.

Every block adds to the stream, and each sum rounds to the dtype of its operands. In bf16 that is
most of the error of a log-probability that products do not make. Here embeddings give fp32, sums
with a block's bf16 output are then fp32 too, and norms, which compute in fp32 anyway, round once to
the weights' dtype. A
frozen head's logits are not rounded either, which is as much again. What is kept for the backward
pass stays as it was.
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from alignkit.engine.tail import use_exact_logits
from alignkit.errors import AlignkitError
from alignkit.models.lean import LeanLayerNorm, LeanRMSNorm
from alignkit.utils.autocast import HALF, no_autocast

Residual: TypeAlias = Literal["weights", "float32"]

_WIDENED = "_alignkit_residual_widened"
_DTYPE_OF = "_alignkit_dtype_of"  # attribute of a rotary embedding: a module with weights


def widen_residual(model: PreTrainedModel) -> None:
    """Let a model's blocks add up in fp32, in place, and a frozen head's products stay fp32.

    Without half precision that changes nothing.

    Args:
        model: With its norms lightened.

    Raises:
        AlignkitError: A norm of the model is not lightened, and would pass fp32 on to products.
    """
    embedding = model.get_input_embeddings()
    embedding = getattr(embedding, "base", embedding)  # below an adapter, whose rows are fp32
    for name, module in model.named_modules():
        if isinstance(module, LeanRMSNorm):
            module.rounds = True
        elif isinstance(module, LeanLayerNorm):
            module.rounded = _rounded_layer_norm
        elif "rotary" in type(module).__name__.lower():
            module.__dict__[_DTYPE_OF] = embedding
            module.register_forward_hook(_rounded_rotation)
        elif "norm" in type(module).__name__.lower() and next(module.children(), None) is None:
            raise AlignkitError(
                f"model.residual float32: {name} ({type(module).__name__}) is no norm that rounds "
                "to the weights' dtype; leave it out"
            )
    embedding.register_forward_hook(_to_fp32)
    use_exact_logits(model)
    setattr(model, _WIDENED, True)


def is_widened(model: nn.Module) -> bool:
    """Tell whether `widen_residual` has changed a model, or the one that it is a copy of."""
    return bool(getattr(model, _WIDENED, False))


def _to_fp32(module: nn.Module, given: Any, output: Tensor) -> Tensor:
    return output.float() if output.dtype in HALF else output


def _rounded_rotation(module: nn.Module, given: Any, output: Any) -> Any:
    """Keep queries and keys in the values' dtype where autocast does not see to that.

    Rotary embeddings take the dtype of the stream.
    """
    dtype = module.__dict__[_DTYPE_OF].weight.dtype
    if dtype not in HALF or torch.is_autocast_enabled(output[0].device.type):
        return output
    return tuple(part.to(dtype) for part in output)


def _rounded_layer_norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    output: Tensor = _RoundedLayerNorm.apply(  # type: ignore[no-untyped-call]
        x, norm.weight, norm.bias, norm.normalized_shape, norm.eps
    )
    return output


class _RoundedLayerNorm(torch.autograd.Function):
    """Normalise in fp32, return the weights' dtype, and keep the input in that."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, shape: Any, eps: float
    ) -> Tensor:
        with no_autocast(x.device.type):
            output, mean, scale = torch.ops.aten.native_layer_norm(
                x, shape, weight.float(), None if bias is None else bias.float(), eps
            )
        ctx.save_for_backward(x.to(weight.dtype), weight, bias, mean, scale)
        ctx.shape, ctx.dtype = shape, x.dtype
        rounded: Tensor = output.to(weight.dtype)
        return rounded

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, scale = ctx.saved_tensors
        wanted = list(ctx.needs_input_grad[:3])
        with no_autocast(grad.device.type):
            grad_x, grad_weight, grad_bias = torch.ops.aten.native_layer_norm_backward(
                grad.float(), x.float(), ctx.shape, mean, scale, weight.float(),
                None if bias is None else bias.float(), wanted,
            )  # fmt: skip
        return (
            grad_x.to(ctx.dtype) if wanted[0] else None,
            grad_weight.to(weight.dtype) if wanted[1] else None,
            grad_bias.to(bias.dtype) if wanted[2] and bias is not None else None,
            None,
            None,
        )
