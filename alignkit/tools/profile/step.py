"""Measure one setup of ``alignkit profile`` in a process of its own.

``python -m alignkit.tools.profile.step`` reads a `Setup` as JSON from standard input and writes a
`Measurement`, or ``{"error": …}``, as the last line of standard output.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW

from alignkit.engine import Example, PackedBatch, collate, score
from alignkit.errors import AlignkitError
from alignkit.lora import LoRAConfig, base_parameter_count, inject_lora, trainable_parameter_count
from alignkit.models.load import load_model
from alignkit.objectives.language import cross_entropy_sum
from alignkit.utils.memory import peak_bytes, reset_peak

_WARMUP_STEPS = 2  # the first allocates optimizer state, the second grows the allocator's pools


@dataclass(frozen=True)
class Setup:
    """Hold what one process is to measure, as values that JSON can hold.

    Example:
        >>> Setup("gpt2", None, random_init=True, mixed=False, rows=4, tokens=256, steps=10,
        ...       device="cpu").tokens
        256

    Attributes:
        base: The base model, as `load_model` takes it.
        lora: `LoRAConfig.to_dict`, or ``None`` for full fine-tuning.
        random_init: Draw the base's weights instead of reading them.
        mixed: Use bf16 autocast, over a bf16 base with LoRA and over fp32 weights without;
            otherwise everything is fp32.
        rows: Documents in a step.
        tokens: Tokens in a document.
        steps: Measured steps.
        device: The device, such as ``cpu`` or ``cuda:0``.
    """

    base: str
    lora: dict[str, Any] | None
    random_init: bool
    mixed: bool
    rows: int
    tokens: int
    steps: int
    device: str


@dataclass(frozen=True)
class Measurement:
    """Hold what one process measured, as medians over its steps.

    Example:
        >>> Measurement(1000, 10, forward=0.2, backward=0.2, optimizer=0.1, step=0.5,
        ...             peak_bytes=2**20).step
        0.5

    Attributes:
        base_parameters: Number of the model's parameters without adapters, a tied head once.
        trainable_parameters: Number of the parameters that the optimizer changes.
        forward: Seconds from the batch to the loss. With a frozen head they include the head's
            share of the backward pass, which is computed while its logits exist.
        backward: Seconds of the rest of the backward pass.
        optimizer: Seconds of AdamW and of dropping the gradients.
        step: Seconds of the three together.
        peak_bytes: Peak memory of training in bytes, above that of a process without a model.
    """

    base_parameters: int
    trainable_parameters: int
    forward: float
    backward: float
    optimizer: float
    step: float
    peak_bytes: int


def measure(setup: Setup) -> Measurement:
    """Train a few steps of language modelling on random tokens, and return their times."""
    device = torch.device(setup.device)
    torch.manual_seed(0)
    reset_peak(device)
    empty = peak_bytes(device)
    model = _build(setup).to(device)
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4, fused=True)
    batch = _batch(setup, model.get_input_embeddings().num_embeddings).to(device)
    reset_peak(device)
    times = [_step(setup, model, optimizer, batch) for _ in range(_WARMUP_STEPS + setup.steps)]
    forward, backward, update = (median(part) for part in zip(*times[_WARMUP_STEPS:], strict=True))
    return Measurement(
        base_parameters=base_parameter_count(model),
        trainable_parameters=trainable_parameter_count(model),
        forward=forward,
        backward=backward,
        optimizer=update,
        step=median(sum(parts) for parts in times[_WARMUP_STEPS:]),
        peak_bytes=peak_bytes(device) - empty,
    )


def _build(setup: Setup) -> Any:
    adapt = setup.lora is not None
    # A frozen base is stored in bf16; weights that train need fp32 master copies.
    dtype = torch.bfloat16 if setup.mixed and adapt else torch.float32
    model = load_model(setup.base, dtype=dtype, random_init=setup.random_init)
    context = getattr(model.config, "max_position_embeddings", setup.tokens)
    if setup.tokens > context:
        raise AlignkitError(f"tokens: {setup.tokens} passes the model's context of {context}")
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    if setup.lora is not None:
        model = inject_lora(model, LoRAConfig.from_dict(setup.lora))
    else:
        model.requires_grad_(True)
    return model.train()


def _batch(setup: Setup, vocabulary: int) -> PackedBatch:
    ids = torch.randint(vocabulary, (setup.rows, setup.tokens)).tolist()
    return collate([Example(prompt=[], responses=[row]) for row in ids])


def _step(
    setup: Setup, model: Any, optimizer: AdamW, batch: PackedBatch
) -> tuple[float, float, float]:
    """Take one optimizer step, and return the seconds of forward, backward and update."""
    device = torch.device(setup.device)
    clock = _clock(device)
    start = clock()
    autocast = torch.autocast(device.type, torch.bfloat16) if setup.mixed else nullcontext()
    with autocast:
        loss = cross_entropy_sum(score(model, batch)) / batch.num_scored
    forward = clock()
    torch.autograd.backward(loss)
    backward = clock()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return forward - start, backward - forward, clock() - backward


def _clock(device: torch.device) -> Callable[[], float]:
    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    return now


def main() -> int:
    """Measure the setup on standard input, print the result, and return the exit status."""
    try:
        print(json.dumps(asdict(measure(Setup(**json.load(sys.stdin))))))
    except AlignkitError as error:
        print(json.dumps({"error": str(error)}))
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
