"""Draw or compute an adapter's first A and B, whose product some methods subtract from W.

Shape letters: I input width, O output width, R rank.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from alignkit.errors import AlignkitError
from alignkit.lora.config import LoRAConfig

SUBTRACTED = ("pissa", "olora")
"""Values of ``init`` whose first product A B is subtracted from the weight."""


class Start(NamedTuple):
    """Hold an adapter's first A and B, and whether their product is subtracted from the weight.

    PiSSA and OLoRA start from a part of the weight itself. This part must be subtracted, so that
    the layer's output is unchanged at the start. PEFT subtracts it from the weight permanently.
    alignkit keeps the weight as it is, and subtracts a frozen copy of A and B in the forward pass.
    The adapter can thus be turned off exactly, and a bf16 base loses nothing to rounding.

    Example:
        >>> first = start(LoRAConfig(r=2), torch.ones(5, 3))
        >>> first.a_IR.shape, first.b_RO.shape, first.subtract
        (torch.Size([5, 2]), torch.Size([2, 3]), False)

    Attributes:
        a_IR: [I, R], in fp32.
        b_RO: [R, O], in fp32.
        subtract: Whether the product is subtracted.
    """

    a_IR: Tensor
    b_RO: Tensor
    subtract: bool


@torch.no_grad()
def start(config: LoRAConfig, weight_IO: Tensor) -> Start:
    """Draw or compute the first A and B of a linear layer, in fp32 on the weight's device.

    Args:
        config: With the layer's own ``r`` and ``alpha``.
        weight_IO: [I, O], the frozen weight.

    Raises:
        AlignkitError: A rank beyond the weight's own under ``pissa`` or ``olora``.
    """
    inputs, outputs = weight_IO.shape
    r = config.r
    options: dict[str, Any] = {"device": weight_IO.device, "dtype": torch.float32}
    if config.init == "gaussian":
        a_IR = torch.randn(inputs, r, **options) * config.init_std
        return Start(a_IR, torch.zeros(r, outputs, **options), subtract=False)
    if config.init == "kaiming":
        bound = 1 / math.sqrt(inputs)
        a_IR = torch.empty(inputs, r, **options).uniform_(-bound, bound)
        return Start(a_IR, torch.zeros(r, outputs, **options), subtract=False)
    if config.init == "orthogonal":
        a_IR, b_RO = _orthogonal(inputs, outputs, r, options)
        return Start(a_IR, b_RO, subtract=False)
    if r > min(inputs, outputs):
        raise AlignkitError(
            f"LoRAConfig.r is {r} but init={config.init!r} splits a weight of {inputs}x{outputs}; "
            f"give a rank of at most {min(inputs, outputs)}"
        )
    factors = _pissa if config.init == "pissa" else _olora
    a_IR, b_RO = factors(weight_IO.float(), r, config.scale)
    return Start(a_IR.contiguous(), b_RO.contiguous(), subtract=True)


def _pissa(weight_IO: Tensor, r: int, scale: float) -> tuple[Tensor, Tensor]:
    """Compute PiSSA's start, ``s A B = U_r S_r V_rᵀ`` (arXiv:2404.02948, eq. 2 and 3).

    The matrix is decomposed as [O, I], as PEFT does: readers of a saved adapter repeat the
    decomposition, and only the same one gives the same rounding where singular values lie close
    together.
    """
    v, s, uh = torch.linalg.svd(weight_IO.t(), full_matrices=False)
    root = (s[:r] / scale).sqrt()
    return (root[:, None] * uh[:r]).t(), (v[:, :r] * root).t()


def _olora(weight_IO: Tensor, r: int, scale: float) -> tuple[Tensor, Tensor]:
    """Compute OLoRA's start from ``Wᵀ = Q R`` (arXiv:2406.01775, sec. 3).

    B is Q's first r columns, and A is R's first r rows.
    """
    q, upper = torch.linalg.qr(weight_IO.t())
    return upper[:r].t(), q[:, :r].t()


def _orthogonal(
    inputs: int, outputs: int, r: int, options: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Draw A and B that are not zero but have the product ``A B = 0``.

    They span the two halves of one random rotation, with entries scaled by 1/10, as in PEFT's
    ``orthogonal`` (Datta Nimmaturi, "Rethinking LoRA initialisation",
    datta0.github.io/posts/rethink-lora-init).
    """
    q, _ = torch.linalg.qr(torch.randn(r, r, **options))
    a_IR = torch.randn(inputs, r // 2, **options) @ q[0::2] / 10
    b_RO = q[1::2].t() @ torch.randn(r // 2, outputs, **options) / 10
    return a_IR, b_RO
