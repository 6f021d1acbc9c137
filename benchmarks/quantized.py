"""Take a DPO step of a shape whose base lies in 4 bits, and record the peak of the process.

    python benchmarks/quantized.py --shape llama-7b --json quantized.json

Weights are random, and packed a layer at a time as they are made: the plain 7B never exists. On a
CPU without bf16 units the products and what is not packed are fp32, else bf16.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-7b": (
        "llama",
        {
            "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000,
        },
    ),
    "pythia-1.4b": (
        "gpt_neox",
        {
            "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24,
            "num_attention_heads": 16, "vocab_size": 50304,
        },
    ),
    "tiny": (
        "llama",
        {
            "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512,
        },
    ),
}  # fmt: skip
_NOISE = 2**22


def build(shape: str, to: str, dtype: torch.dtype) -> Any:
    """Return a model of random weights, each linear layer packed as soon as it is made."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from alignkit.lora.adapter import plain_modules, replace_module
    from alignkit.lora.targets import all_linear
    from alignkit.models.lean import lean_modules
    from alignkit.models.quantize import Int8Linear, NF4Linear

    family, sizes = SHAPES[shape]
    config = AutoConfig.for_model(family, **sizes)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    lean_modules(model)
    noise = torch.randn(_NOISE).to(dtype) * 0.02

    def drawn(like: Tensor) -> Tensor:
        if like.ndim == 1:
            return torch.ones(like.shape, dtype=dtype)
        repeats = -(-like.numel() // _NOISE)
        return noise.repeat(repeats)[: like.numel()].view(like.shape).clone()

    modules = plain_modules(model)
    kind = {"nf4": NF4Linear, "int8": Int8Linear}[to]
    for path in all_linear(model).adapted:
        linear = modules[path]
        linear.weight = nn.Parameter(drawn(linear.weight), requires_grad=False)
        if linear.bias is not None:
            linear.bias = nn.Parameter(torch.zeros(linear.bias.shape, dtype=dtype), False)
        replace_module(model, path, kind(linear))
        linear.weight = None
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                module._parameters[name] = nn.Parameter(drawn(parameter), requires_grad=False)
        if "rotary" in type(module).__name__.lower():
            fresh = type(module)(config=config)
            module._buffers.update(fresh._buffers)
            module.__dict__.update(
                {name: value for name, value in fresh.__dict__.items() if isinstance(value, Tensor)}
            )
    return model.eval()


def step(model: Any, tokens: int, vocabulary: int) -> float:
    """Take one step of DPO with LoRA on all linear layers, and return its loss."""
    from torch.optim import AdamW

    from alignkit.engine import Example, collate
    from alignkit.lora import LoRAConfig, inject_lora
    from alignkit.modules.pair_scores import pair_scores
    from alignkit.modules.reference import frozen_copy
    from alignkit.objectives.preference import DPO

    inject_lora(model, LoRAConfig(targets="all-linear"))
    reference = frozen_copy(model)
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    ids = torch.randint(vocabulary, (tokens,)).tolist()
    half, rest = tokens // 2, tokens // 4
    batch = collate([Example(ids[:half], [ids[half : half + rest], ids[half + rest :]])])
    model.train()
    with torch.no_grad():
        theirs = pair_scores(reference, batch)
    loss = DPO()(pair_scores(model, batch), theirs).mean()
    loss.backward()
    optimizer.step()
    return loss.item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="llama-7b")
    parser.add_argument("--quantize", choices=("nf4", "int8"), default="nf4")
    parser.add_argument("--tokens", type=int, default=64, help="of the step's row")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    from alignkit.utils.memory import peak_bytes, reset_peak

    device = torch.device("cpu")
    units = bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    dtype = torch.bfloat16 if units else torch.float32
    torch.manual_seed(0)
    start = time.perf_counter()
    model = build(options.shape, options.quantize, dtype)
    made, built = time.perf_counter() - start, peak_bytes(device)
    reset_peak(device)
    loss = step(model, options.tokens, SHAPES[options.shape][1]["vocab_size"])
    result = {
        "shape": options.shape,
        "quantize": options.quantize,
        "dtype": str(dtype).removeprefix("torch."),
        "tokens": options.tokens,
        "loss": loss,
        "peak_while_made": built,
        "peak_of_step": peak_bytes(device),
        "seconds": {"made": made, "step": time.perf_counter() - start - made},
    }
    print(json.dumps(result))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
