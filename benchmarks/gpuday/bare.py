"""alignkit's modules taking steps without a trainer: what a step costs by itself."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from itertools import cycle
from typing import Any

import torch
from sidebyside.flops import Costs, step_flops
from sidebyside.job import Task
from sidebyside.setup import empty_model
from sidebyside.shapes import SHAPES, targets_of
from torch import Tensor

from alignkit import AlignmentModule, DPOModule, LoRAModule, SFTModule
from alignkit.engine import Example, PackedBatch, collate
from alignkit.lora import LoRAConfig, inject_lora, trainable_parameter_count
from gpuday.day import Day

_MODULES: dict[Task, type[AlignmentModule]] = {
    "dpo": DPOModule,
    "sft": SFTModule,
    "lm": LoRAModule,
}


def lora_of(shape: str) -> LoRAConfig:
    """The adapters that every part trains."""
    return LoRAConfig(r=8, alpha=16, targets=targets_of(SHAPES[shape]))


def build(day: Day, task: Task, shape: str, **options: Any) -> AlignmentModule:
    """A task's module over a shape's random weights in bf16, on the device and in training."""
    module = _MODULES[task](day.model(shape), lora=lora_of(shape), dtype="bfloat16", **options)
    module.to(day.device).train()
    return module


class Step:
    """One optimizer step a call, bf16 autocast over batches that come again and again.

    Args:
        module: From `build`.
        batches: Already on the device.
    """

    def __init__(self, module: AlignmentModule, batches: Sequence[PackedBatch]) -> None:
        self.module = module
        self.batches = cycle(batches)
        trained = [p for p in module.parameters() if p.requires_grad]
        self.optimizer = module.optimizer(trained)
        self.loss: Tensor | None = None

    def __call__(self) -> None:
        batch = next(self.batches)
        with torch.autocast(batch.input_ids.device.type, torch.bfloat16):
            output = self.module.compute_loss(batch)
            loss = output.loss_sum / output.weight
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.loss = loss.detach()


def steps_of(day: Day, task: Task, shape: str, count: int) -> list[list[Example]]:
    """Examples of some optimizer steps, a row each."""
    size = day.sizes.per_step
    examples = day.examples(task, shape, count * size)
    return [examples[start : start + size] for start in range(0, len(examples), size)]


def batches_of(day: Day, steps: Sequence[Sequence[Example]]) -> list[PackedBatch]:
    """Each step as one row on the device."""
    return [collate(step).to(day.device) for step in steps]


def flops_of(task: Task, shape: str, examples: Sequence[Example]) -> float:
    """FLOPs that a step on these examples needs; see `sidebyside.flops`."""
    model = empty_model(SHAPES[shape])
    adapters = trainable_parameter_count(inject_lora(model, lora_of(shape)))
    costs = Costs.of(empty_model(SHAPES[shape]), adapters)
    return step_flops(costs, examples, reference=task == "dpo")


def free(day: Day) -> None:
    """Return what the last model held to the device."""
    gc.collect()
    if day.device == "cuda":
        torch.cuda.empty_cache()
