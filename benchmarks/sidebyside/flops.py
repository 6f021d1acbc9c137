"""How much arithmetic a step needs, and how fast this machine could do it.

Counted are the model's own FLOPs for tokens that carry information: every prompt once, no
padding, nothing recomputed, the head only where a token is scored. A multiply-add is two.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from alignkit.engine import Example

_CEILING_SIZE = {"cpu": 2048, "cuda": 8192}
# On a GPU products follow each other: one alone would be timed with its launch.
_PRODUCTS = {"cpu": 1, "cuda": 10}


@dataclass(frozen=True)
class Costs:
    """What decides a model's FLOPs.

    Attributes:
        body: Weights of all linear layers but the head.
        head: Weights of the head.
        attention: Layers × heads × head width.
        adapters: Weights of the low-rank adapters.
    """

    body: int
    head: int
    attention: int
    adapters: int

    @classmethod
    def of(cls, model: PreTrainedModel, adapters: int) -> Costs:
        """Count a model's weights; it may lie on the meta device."""
        head = model.get_output_embeddings()
        body = sum(
            module.weight.numel()
            for module in model.modules()
            if isinstance(module, (nn.Linear, Conv1D)) and module is not head
        )
        config = model.config
        width = (
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        )
        heads = config.num_hidden_layers * config.num_attention_heads
        return cls(body, head.weight.numel(), heads * width, adapters)


def step_flops(
    costs: Costs, examples: Iterable[Example], *, reference: bool, full: bool = False
) -> float:
    """FLOPs of one optimizer step.

    Forward: 2 a weight and token, 4 a head channel and visible pair of positions (scores and
    values). Backward: the same again for the inputs' gradients, and once more for the weights'
    where they train; attention's backward is twice its forward.

    Args:
        costs: The model's.
        examples: The step's.
        reference: Whether a frozen reference scores them as well.
        full: Whether the whole model trains, rather than adapters.
    """
    tokens = scored = seen = 0
    for example in examples:
        prompt, responses = len(example.prompt), [len(r) for r in example.responses]
        tokens += prompt + sum(responses)
        scored += sum(responses) - (0 if prompt else len(responses))
        seen += prompt * (prompt + 1) // 2
        seen += sum(r * prompt + r * (r + 1) // 2 for r in responses)
    body, head = 2.0 * costs.body * tokens, 2.0 * costs.head * scored
    attention = 4.0 * costs.attention * seen
    adapters = 0.0 if full else 2.0 * costs.adapters * tokens
    passes = 3 if full else 2  # forward, inputs' gradients, and where they train, weights'
    policy = passes * (body + head) + 3 * (attention + adapters)
    return policy + (body + head + attention + adapters if reference else 0.0)


def matmul_ceiling(
    device: str, size: int | None = None, dtype: torch.dtype = torch.bfloat16
) -> float:
    """Measured FLOP/s of a matrix product, the median of a second's worth.

    Args:
        device: ``cpu`` or ``cuda``.
        size: Of the square factors; large enough for the device by default.
        dtype: Of the factors.
    """
    size, products = size or _CEILING_SIZE[device], _PRODUCTS[device]
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    left @ right  # compiles the kernel
    times: list[float] = []
    begin = time.perf_counter()
    # One product takes half a minute on a CPU without bf16 instructions: no minimum but one.
    while not times or time.perf_counter() - begin < 1.0:
        start = _now(device)
        for _ in range(products):
            left @ right
        times.append(_now(device) - start)
    return 2.0 * products * size**3 / median(times)


def _now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
