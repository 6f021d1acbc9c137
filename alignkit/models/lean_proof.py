"""Find modules that could be RMSNorms or gated MLPs, and check that a lean one computes the same.

Structure alone does not say what a module computes. Gemma scales by ``1 + w`` where Llama scales by
``w``, and a module may clamp, or add ε outside the root. Both forward passes therefore run on the
same random input and parameters, and values and gradients must agree. A norm is tried with a weight
of its own width, an MLP with small random layers in place of its own. Nothing large is copied or
multiplied.

Shape letters: T rows, D width.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Hashable

import torch
from torch import Tensor, nn

FUSED = {"gate_up_proj", "down_proj"}
APART = {"gate_proj", "up_proj", "down_proj"}
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 4e-2}
"""Largest difference, as a share of the largest entry of its row."""

_FORWARD_ERRORS = (RuntimeError, TypeError, ValueError, AttributeError, LookupError, AssertionError)
"""Errors that a forward pass may raise over these inputs; the module then counts as different."""


def is_rms_norm(module: nn.Module) -> bool:
    """Tell whether the module holds one vector and an epsilon and nothing else, as RMSNorm does."""
    weight = module._parameters.get("weight")
    plain = not module._modules and not module._buffers and "forward" not in module.__dict__
    return (
        plain
        and list(module._parameters) == ["weight"]
        and weight is not None
        and weight.ndim == 1
        and len(_epsilons(module)) == 1
    )


def is_gated_mlp(module: nn.Module) -> bool:
    """Tell whether the module holds gate, up and down layers, and at most an activation beside."""
    names = set(module._modules)
    layers = FUSED if names >= FUSED else APART
    if not names >= layers or "forward" in module.__dict__:
        return False
    others = [module._modules[name] for name in names - layers]
    bare = all(other is not None and not other.state_dict() for other in others)
    return len(others) <= 1 and bare and not module._parameters and not module._buffers


def epsilon_of(norm: nn.Module) -> float:
    """Return the one ε of an RMSNorm, whatever its attribute is called."""
    (epsilon,) = _epsilons(norm)
    return epsilon


def settings(module: nn.Module) -> Hashable:
    """Return what the comparison depends on: class, attributes, width, dtype and activation.

    Attributes that are no plain values count by identity. Compare settings only while their modules
    exist.
    """
    own = tuple(
        (name, value if isinstance(value, (bool, int, float, str, type(None))) else id(value))
        for name, value in sorted(module.__dict__.items())
        if not name.startswith("_") and name != "training"
    )
    parameters = tuple((p.shape, p.dtype) for p in module.parameters(recurse=False))
    dtypes = tuple(p.dtype for p in module.parameters())
    names = sorted(module._modules)
    inner = tuple((n, settings(module._modules[n])) for n in names if not n.endswith("_proj"))  # type: ignore[arg-type]
    return (type(module), own, parameters, frozenset(dtypes), tuple(names), inner)


def same_norm(module: nn.Module, lean: type[nn.Module]) -> bool:
    """Check that ``lean`` computes this norm, in fp32, in half precision and in a mix of both."""
    weight, half = module._parameters["weight"], _half_dtype(module)
    assert weight is not None  # for the type checker: `is_rms_norm` has seen it
    draw = torch.Generator().manual_seed(0)
    small = math.sqrt(abs(epsilon_of(module))) or 1e-3  # at which ε and its place matter
    x_TD = _randn(draw, 6, len(weight))
    # Models have outliers. One of them shows whether the module clamps.
    rough_TD = x_TD * torch.tensor([1, 1, small, small, 30, 1], device="cpu")[:, None]
    rough_TD[-1, 0] = 1e4
    weight_D = _randn(draw, len(weight))
    cases = [
        (rough_TD, 50 * weight_D),
        (rough_TD, weight_D),
        (x_TD.to(half), weight_D.to(half)),
        (x_TD.to(half), weight_D),
    ]
    return all(_agree(module, lean, x, {"weight": weight}, {}) for x, weight in cases)


def same_mlp(module: nn.Module, lean: type[nn.Module]) -> bool:
    """Check that ``lean`` computes this MLP with small layers, in fp32 and in half precision."""
    draw = torch.Generator().manual_seed(0)
    x_TD = _randn(draw, 6, 8)
    shapes = {"gate_proj": (16, 8), "up_proj": (16, 8), "gate_up_proj": (32, 8)}
    layers = FUSED if set(module._modules) >= FUSED else APART
    weights = {name: _randn(draw, *shapes.get(name, (8, 16))) for name in sorted(layers)}
    rough_TD = x_TD * torch.tensor([1, 1, 0.1, 10, 100, 1000], device="cpu")[:, None]
    return all(
        _agree(module, lean, x.to(dtype), {}, {n: w.to(dtype) for n, w in weights.items()})
        for x, dtype in ((rough_TD, torch.float32), (x_TD, _half_dtype(module)))
    )


def _agree(
    module: nn.Module,
    lean: type[nn.Module],
    x: Tensor,
    parameters: dict[str, Tensor],
    layers: dict[str, Tensor],
) -> bool:
    """Check that values and gradients agree, with these parameters and layers in the module."""
    try:
        theirs = _outputs_and_gradients(module, type(module), x, parameters, layers)
        ours = _outputs_and_gradients(module, lean, x, parameters, layers)
    except _FORWARD_ERRORS:
        return False
    if any(a.dtype != b.dtype or a.shape != b.shape for a, b in zip(theirs, ours, strict=True)):
        return False
    # The input's dtype is the coarsest of those that the tensors went through.
    tolerance = TOLERANCE[x.dtype]
    return all(
        bool(((a - b).abs() <= tolerance * b.abs().amax(-1, keepdim=True)).all())
        for a, b in zip(ours, theirs, strict=True)
    )


def _outputs_and_gradients(
    module: nn.Module,
    cls: type[nn.Module],
    x: Tensor,
    parameters: dict[str, Tensor],
    layers: dict[str, Tensor],
) -> list[Tensor]:
    """Return output, input gradient and parameter gradients of a copy of ``module``."""
    twin = copy.copy(module)
    twin.__class__ = cls
    twin._parameters = {name: nn.Parameter(value.clone()) for name, value in parameters.items()}
    twin._modules = dict(module._modules)
    for name, weight in layers.items():
        rows, columns = weight.shape
        twin._modules[name] = linear = nn.Linear(columns, rows, bias=False, device="meta")
        linear.weight = nn.Parameter(weight.clone())
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast("cpu", enabled=False),
    ):
        x = x.clone().requires_grad_()
        output = twin.forward(x)  # not a call, which would run hooks
        grad = _randn(torch.Generator().manual_seed(1), *output.shape).to(output.dtype)
        trained = [x, *(p for p in twin.parameters() if p.requires_grad)]
        return [output.detach(), *torch.autograd.grad(output, trained, grad)]


def _epsilons(module: nn.Module) -> list[float]:
    own = module.__dict__.items()
    return [value for name, value in own if "eps" in name and isinstance(value, float)]


def _half_dtype(module: nn.Module) -> torch.dtype:
    """Return the module's half-precision dtype; bf16 where it has none."""
    dtypes = {p.dtype for p in module.parameters()} & {torch.float16, torch.bfloat16}
    return dtypes.pop() if dtypes else torch.bfloat16


def _randn(draw: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=draw, device="cpu", dtype=torch.float32)
