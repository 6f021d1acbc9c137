"""Run a half-precision model in fp32 for a moment, with fp32 copies of one block at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from alignkit.utils.autocast import HALF, no_autocast


@contextmanager
def in_fp32(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Compute a model's forwards in fp32, with the values its weights have now.

    Only one block at a time holds fp32 copies, and so do the modules outside the blocks (embeddings
    and head). A whole second model therefore need not fit into memory. Autocast, reduced-precision
    products and compiled code are off meanwhile.

    Args:
        model: Its parameters may be in any dtype. The context puts them back when it ends.
        device: Where the parameters lie.
    """
    blocks = outermost_blocks(model)
    inside = {id(module) for block in blocks for module in block.modules()}
    before = torch.get_float32_matmul_precision()
    with ExitStack() as stack:
        stack.callback(torch.set_float32_matmul_precision, before)
        torch.set_float32_matmul_precision("highest")
        stack.enter_context(no_autocast(device.type))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        for block in blocks:
            copies = _Fp32Copies(list(block.modules()))
            stack.callback(copies.put_back)
            for hook in (
                block.register_forward_pre_hook(copies.widen),
                block.register_forward_hook(copies.put_back, always_call=True),
            ):
                stack.callback(hook.remove)
        outside = _Fp32Copies([module for module in model.modules() if id(module) not in inside])
        stack.callback(outside.put_back)
        outside.widen()
        yield


def outermost_blocks(model: nn.Module) -> list[GradientCheckpointingLayer]:
    """Return a model's blocks, without those that lie inside others."""
    blocks: list[GradientCheckpointingLayer] = []
    inside: set[int] = set()
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer) and id(module) not in inside:
            blocks.append(module)
            inside.update(id(child) for child in module.modules())
    return blocks


class _Fp32Copies:
    """Put fp32 copies in the places of some modules' half-precision parameters and buffers.

    Args:
        modules: Each module's own tensors are replaced, not those of its children.
    """

    def __init__(self, modules: list[nn.Module]) -> None:
        self.modules = modules
        self.originals: list[tuple[dict[str, Any], str, Tensor]] = []

    def widen(self, *_: object) -> None:
        copies: dict[int, Tensor] = {}  # a tied tensor stays tied
        for module in self.modules:
            tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
            for tensors in tables:
                for name, tensor in tensors.items():
                    if tensor is None or tensor.dtype not in HALF:
                        continue
                    if id(tensor) not in copies:
                        copy = tensor.detach().float()
                        is_parameter = isinstance(tensor, nn.Parameter)
                        copies[id(tensor)] = nn.Parameter(copy, False) if is_parameter else copy
                    self.originals.append((tensors, name, tensor))
                    tensors[name] = copies[id(tensor)]

    def put_back(self, *_: object) -> None:
        for tensors, name, tensor in self.originals:
            tensors[name] = tensor
        self.originals.clear()
