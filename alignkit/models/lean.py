"""Make elementwise modules of transformers lighter on memory and time, with the same results.

transformers writes RMSNorm, gated MLPs and GPT-2's GELU as chains of eager operations. RMSNorm
keeps fp32 copies of its input for the backward pass, and a gated MLP keeps three tensors of its
width. Here each is one autograd node that keeps its inputs alone. On CUDA, autocast makes fp32
copies for the kernels of norms, although these compute in fp32 in any case. The lean norms prevent
that.

Every family has classes of its own for the same formulas. A module is therefore recognised by its
structure, and replaced once `lean_proof` has shown that the lean one computes the same.

Shape letters: T rows (all leading axes), D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers.activations import ACT2FN, NewGELUActivation

from alignkit.models.lean_proof import (
    epsilon_of,
    is_gated_mlp,
    is_rms_norm,
    same_mlp,
    same_norm,
    settings,
)
from alignkit.utils.autocast import no_autocast

CACHED = 2**18
"""Elements of a norm's input that are in fp32 at once on the CPU, where they stay in the cache."""


def lean_modules(model: nn.Module) -> int:
    """Replace norms, gated MLPs and GPT-2's ``gelu_new`` by lighter ones, in place.

    Parameters, their names and the config do not change, so that saved models are unchanged. A
    replaced module stays an instance of its class. Results agree up to rounding in fp32 (2.4e-7 for
    the GELU), and in half precision they round once less. A module for which that cannot be shown
    is left as it is.

    ``gelu_new`` is ``0.5 x (1 + tanh(√(2/π) (x + 0.044715 x³)))`` in eager operations that keep 8
    bytes an element for the backward pass. `torch.nn.functional.gelu` with ``approximate="tanh"``
    computes the same formula in one kernel that keeps 2 (bf16).

    ``model.lightened`` keeps the result as a line, which training logs.

    Returns:
        The number of norms and MLPs lightened by this call.
    """
    lightened = total = 0
    lean_classes: dict[object, type[nn.Module] | None] = {}
    for module in list(model.modules()):
        if isinstance(module, (_LeanModule, LeanLayerNorm)):
            continue
        lean = _lean_class(module, lean_classes)
        if lean is not None:
            module.__class__ = lean
        lighter = _replace_gelu(module) or lean is not None
        lightened += lighter
        total += lighter or _is_norm_or_mlp(module)
    if total and not hasattr(model, "lightened"):
        model.__dict__["lightened"] = f"{lightened} of {total} norms and MLPs lightened"
    return lightened


def _lean_class(
    module: nn.Module, lean_classes: dict[object, type[nn.Module] | None]
) -> type[nn.Module] | None:
    """Return a lighter class that computes the same as ``module``; ``None`` where none does."""
    if type(module) is nn.LayerNorm:
        return LeanLayerNorm if module.elementwise_affine else None
    if is_rms_norm(module):
        find_class: Callable[[nn.Module], type[nn.Module] | None] = _lean_norm
    elif is_gated_mlp(module):
        find_class = _lean_mlp
    else:
        return None
    if (key := settings(module)) not in lean_classes:
        lean_classes[key] = find_class(module)
    return lean_classes[key]


def _lean_norm(module: nn.Module) -> type[nn.Module] | None:
    for lean in (LeanRMSNorm, LeanNarrowRMSNorm, LeanOffsetRMSNorm):
        if same_norm(module, candidate := _mixed_class(lean, type(module))):
            return candidate
    return None


def _lean_mlp(module: nn.Module) -> type[nn.Module] | None:
    for lean in (LeanSwiGLU, LeanGeGLU):
        if same_mlp(module, candidate := _mixed_class(lean, type(module))):
            return candidate
    return None


def _replace_gelu(module: nn.Module) -> bool:
    names = [
        name for name, child in module.named_children() if isinstance(child, NewGELUActivation)
    ]
    for name in names:
        setattr(module, name, ACT2FN["gelu_pytorch_tanh"])
    return bool(names)


def _is_norm_or_mlp(module: nn.Module) -> bool:
    """Tell whether the log's total counts a module that was not lightened."""
    name = type(module).__name__.lower()
    leaf = next(module.children(), None) is None
    return is_gated_mlp(module) or name.endswith("mlp") or (leaf and "norm" in name)


class _LeanModule(nn.Module):
    """Define what a lean class is, before `_mixed_class` mixes it with the class it replaces."""

    original: ClassVar[type[nn.Module]]
    lean: ClassVar[type[_LeanModule]]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Return the two classes for ``pickle`` and ``copy``, since no file has the mixed one."""
        return _new_instance, (self.lean, self.original), self.__dict__


_mixed_classes: dict[tuple[type[_LeanModule], type[nn.Module]], type[_LeanModule]] = {}


def _mixed_class(lean: type[_LeanModule], original: type[nn.Module]) -> type[_LeanModule]:
    """Return ``original`` with the forward pass of ``lean``; one class for each pair."""
    if (pair := (lean, original)) not in _mixed_classes:
        body = {"original": original, "lean": lean, "__module__": original.__module__}
        _mixed_classes[pair] = type(f"Lean{original.__name__}", pair, body)
    return _mixed_classes[pair]


def _new_instance(lean: type[_LeanModule], original: type[nn.Module]) -> nn.Module:
    mixed = _mixed_class(lean, original)
    return mixed.__new__(mixed)


class LeanRMSNorm(_LeanModule):
    """Compute RMSNorm, ``w x / √(mean x² + ε)`` (Zhang & Sennrich, arXiv:1910.07467, eq. 4)."""

    offset: ClassVar[float] = 0.0
    promotes: ClassVar[bool] = True
    """Whether an fp32 weight makes the output fp32."""
    rounds = False  # whether to the weight's dtype, see `alignkit.models.residual`

    weight: nn.Parameter

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Normalise [..., D] over its last axis in fp32, and return it in its dtype."""
        weight_D, epsilon = self.weight, epsilon_of(self)
        if torch.compiler.is_compiling():  # the compiler fuses the chain itself
            normed: Tensor = super().forward(hidden_states)
            return normed.to(weight_D.dtype) if self.rounds else normed
        if hidden_states.is_cuda and hidden_states.dtype == weight_D.dtype and not self.offset:
            with no_autocast("cuda"):
                return F.rms_norm(hidden_states, weight_D.shape, weight_D, epsilon)
        dtype = hidden_states.dtype
        if self.promotes:
            dtype = torch.promote_types(dtype, weight_D.dtype)
        dtype = weight_D.dtype if self.rounds else dtype
        normed = _RMSNorm.apply(  # type: ignore[no-untyped-call]
            hidden_states, weight_D, epsilon, self.offset, dtype
        )
        return normed


class LeanNarrowRMSNorm(LeanRMSNorm):
    """Compute RMSNorm as OLMo 2 does: the output has the input's dtype, whatever the weight's."""

    promotes = False


class LeanOffsetRMSNorm(LeanNarrowRMSNorm):
    """Compute RMSNorm as Gemma does: ``(1 + w) x / √(mean x² + ε)``, in the input's dtype."""

    offset = 1.0


class LeanLayerNorm(nn.LayerNorm):
    """Compute LayerNorm (Ba et al. 2016, arXiv:1607.06450) without an fp32 copy from autocast."""

    rounded: Callable[[nn.LayerNorm, Tensor], Tensor] | None = None  # as `rounds` above

    def forward(self, input: Tensor) -> Tensor:
        """Normalise [..., D] over its last axis in fp32, and return it in its dtype."""
        if input.dtype != self.weight.dtype and self.rounded is not None:
            return self.rounded(self, input)
        if torch.compiler.is_compiling() or input.dtype != self.weight.dtype:
            return super().forward(input)
        with no_autocast(input.device.type):
            return super().forward(input)


class LeanSwiGLU(_LeanModule):
    """Compute a gated MLP (SwiGLU, Shazeer 2020, arXiv:2002.05202): ``(silu(x G) ∘ x U) D``.

    G and U are two layers, or one layer that computes both, G first.
    """

    tanh: ClassVar[bool] = False
    """Whether the activation is the GELU's tanh form in place of SiLU."""

    gate_proj: nn.Module
    up_proj: nn.Module
    gate_up_proj: nn.Module
    down_proj: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """Compute [..., D] from [..., D]."""
        if torch.compiler.is_compiling():
            return super().forward(x)  # type: ignore[no-any-return]
        if "gate_up_proj" in self._modules:
            gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        else:
            gate, up = self.gate_proj(x), self.up_proj(x)
        product = _GatedProduct.apply(gate, up, self.tanh)  # type: ignore[no-untyped-call]
        projected: Tensor = self.down_proj(product)
        return projected


class LeanGeGLU(LeanSwiGLU):
    """Compute a gated MLP with the GELU's tanh form (GEGLU): ``(gelu(x G) ∘ x U) D``."""

    tanh = True


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight_D: Tensor, epsilon: float, offset: float, dtype: torch.dtype
    ) -> Tensor:
        x_TD = x.reshape(-1, x.shape[-1])
        output_TD = x.new_empty(x_TD.shape, dtype=dtype)
        factor_D = weight_D.float() + offset if offset else weight_D
        scale_T1 = x.new_empty(len(x_TD), 1, dtype=torch.float32)
        for rows in _row_slices(x_TD):
            part_TD = x_TD[rows].float()
            mean_T1 = part_TD.square().mean(-1, keepdim=True)
            torch.rsqrt(mean_T1.add_(epsilon), out=scale_T1[rows])
            output_TD[rows] = (part_TD * scale_T1[rows]).mul_(factor_D)
        narrower = dtype if dtype.itemsize < x.dtype.itemsize else x.dtype
        ctx.save_for_backward(x.to(narrower), weight_D, scale_T1)
        ctx.offset, ctx.dtype = offset, x.dtype
        return output_TD.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Compute ∂w = Σ g n and ∂x = s (g w − n mean(g w n)) for n = x s, with the offset in w."""
        x, weight_D, scale_T1 = ctx.saved_tensors
        x_TD, grad_TD = (tensor.reshape(-1, x.shape[-1]) for tensor in (x, grad))
        factor_D = weight_D.float() + ctx.offset if ctx.offset else weight_D
        grad_x_TD = torch.empty_like(x_TD, dtype=ctx.dtype)
        grad_weight_D = torch.zeros_like(weight_D, dtype=torch.float32)
        for rows in _row_slices(x_TD):
            normed_TD = x_TD[rows] * scale_T1[rows]
            part_TD = grad_TD[rows].float()
            if ctx.needs_input_grad[1]:
                grad_weight_D += (part_TD * normed_TD).sum(0)
            part_TD = part_TD * factor_D
            mean_T1 = (part_TD * normed_TD).mean(-1, keepdim=True)
            grad_x_TD[rows] = part_TD.sub_(normed_TD.mul_(mean_T1)).mul_(scale_T1[rows])
        grad_weight = grad_weight_D.to(weight_D.dtype) if ctx.needs_input_grad[1] else None
        return grad_x_TD.view(x.shape), grad_weight, None, None, None


def _row_slices(x_TD: Tensor) -> Iterator[slice]:
    size = max(1, CACHED // x_TD.shape[1]) if x_TD.device.type == "cpu" else len(x_TD)
    return (slice(start, start + size) for start in range(0, len(x_TD), size))


class _GatedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, tanh: bool) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.tanh = tanh
        return _activated(gate, tanh).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        if ctx.tanh:
            grad_gate = torch.ops.aten.gelu_backward(grad * up, gate, approximate="tanh")
        else:
            grad_gate = torch.ops.aten.silu_backward(grad * up, gate)
        return grad_gate, _activated(gate, ctx.tanh).mul_(grad), None


def _activated(gate: Tensor, tanh: bool) -> Tensor:
    return F.gelu(gate, approximate="tanh") if tanh else F.silu(gate)
