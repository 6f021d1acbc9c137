"""A step never asks a tensor for its values: on a GPU every such question makes the host wait."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from alignkit.batch import Span
from alignkit.engine import collate
from alignkit.engine.segments import AttentionPlan, DenseAttention
from alignkit.engine.varlen import VarlenAttention
from alignkit.modules import DPOModule, LoRAModule, SFTModule
from alignkit.modules.base import AlignmentModule
from tests.modules.helpers import answers, pairs

# Operators whose result, or its size, is known to the host only once the device has got there.
WAITING = ("_local_scalar_dense", "bincount", "nonzero", "masked_select", "_unique2", "equal")


class Waits(TorchDispatchMode):
    """Collects the names of operators that would make the host wait."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self,
        function: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run the operator and remember it if it waits."""
        kwargs = kwargs or {}
        name = function.overloadpacket.__name__
        repeats = function is torch.ops.aten.repeat_interleave.Tensor
        if name in WAITING or (repeats and kwargs.get("output_size") is None):
            self.names.append(name)
        return function(*args, **kwargs)


@pytest.mark.parametrize(
    "ask",
    [
        lambda tensor: tensor.sum().item(),
        lambda tensor: bool((tensor > 1).any()),
        lambda tensor: (tensor > 1).nonzero(),
        lambda tensor: tensor.repeat_interleave(tensor),
        lambda tensor: torch.bincount(tensor, minlength=9),
    ],
)
def test_questions_are_noticed(ask: Callable[[Tensor], object]) -> None:
    with Waits() as waits:
        ask(torch.tensor([1, 2, 3]))
    assert waits.names


def _stand_in(query: Tensor, key: Tensor, value: Tensor, *_: object, **__: object) -> Tensor:
    """Of the shape of ``varlen_attn``'s output and differentiable in all three."""
    return query + key.sum() + value.sum()


@pytest.mark.parametrize("varlen", [False, True])
@pytest.mark.parametrize("stage", [LoRAModule, SFTModule, DPOModule])
@pytest.mark.parametrize("adapted", [True, False])
def test_steps_on_the_paths_of_a_gpu_never_wait(
    model_dir: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    varlen: bool,
    stage: Callable[..., AlignmentModule],
    adapted: bool,
) -> None:
    """Loss, metrics, gradients and the window's end, with grouped queries."""

    @lru_cache
    def plan_for(
        spans: tuple[Span, ...], device: torch.device, dtype: torch.dtype
    ) -> AttentionPlan:
        with torch.inference_mode(False):
            if varlen:
                return VarlenAttention(spans, device, dtype)
            return DenseAttention(spans, device)

    monkeypatch.setattr(sys.modules["alignkit.engine.score"], "make_plan", plan_for)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", _stand_in)
    monkeypatch.setattr("alignkit.modules.base.check_engine", lambda *_: None)
    lora = {"targets": "all-linear"} if adapted else None
    module = stage(str(model_dir("llama")), lora=lora).train()
    batch = collate(pairs(4) if stage is DPOModule else answers(4))
    module.training_step(batch, 0).backward()  # lays attention out, on the host
    module.window.close(lambda totals: totals)

    with Waits() as waits:
        module.training_step(batch, 1).backward()
        totals = module.window.close(lambda totals: totals)
        module.validation_step(batch, 0)
    assert not waits.names
    assert totals.means["loss"].isfinite()


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_a_batch_is_copied_to_a_gpu_without_waiting(
    monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    """As Lightning moves it; back from a device it has to wait, as nobody else would."""
    batch, asked = collate(pairs(2)), []

    def copy(self: Tensor, to: torch.device, non_blocking: bool = False) -> Tensor:
        asked.append((to.type, non_blocking))
        return self

    monkeypatch.setattr(Tensor, "to", copy)
    move_data_to_device(batch, torch.device(device))
    assert set(asked) == {(device, device == "cuda")}
