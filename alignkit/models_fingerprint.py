"""A cheap, content-based name for a frozen base model."""

from __future__ import annotations

import hashlib
import json

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

_SAMPLES = 4096
# What changes a model's function without changing the name or shape of a parameter.
_CONFIG_KEYS = (
    "model_type",
    "num_attention_heads",
    "num_key_value_heads",
    "n_head",
    "rotary_pct",
    "rope_theta",
)


def base_fingerprint(model: PreTrainedModel) -> str:
    """Return 32 hex digits that name the base's architecture and weights.

    Adapters and checkpoints carry it, so that one is never put on another base. Every parameter
    contributes its name, its shape, an exact checksum of all its values and the values
    themselves at up to 4,096 evenly spaced places. Values are rounded to bfloat16 first, so a
    checkpoint stored in bfloat16 or float32 has one fingerprint whether it is loaded in
    bfloat16 or float32. Loading in float16 rounds differently and gives another.

    LoRA parameters (``lora_*``) and the infix of a wrapped layer (``.base.``) are left out, so
    injecting adapters changes nothing; merging them into the weights does.

    What it does not see: a change below bfloat16's 8 bits, and an edit that permutes values
    between the sampled places or changes them by amounts that cancel in the sum. It guards
    against mistakes, not against a forger.

    Args:
        model: The base, adapters injected or not.

    Returns:
        The first 32 hex digits of a SHA-256.
    """
    digest = hashlib.sha256()
    digest.update(json.dumps(_architecture(model)).encode())
    for name, parameter in sorted(model.named_parameters()):
        parts = name.split(".")
        if any(part.startswith("lora_") for part in parts):
            continue
        plain_name = ".".join(part for part in parts if part != "base")
        values = parameter.detach().to(torch.bfloat16).flatten()
        sample = values[:: max(1, values.numel() // _SAMPLES)].view(torch.int16)
        digest.update(f"{plain_name}{tuple(parameter.shape)}{_checksum(values)}".encode())
        digest.update(sample.cpu().numpy().tobytes())
    return digest.hexdigest()[:32]


def _architecture(model: PreTrainedModel) -> dict[str, object]:
    rope = getattr(model.config, "rope_parameters", None) or {}
    found = {key: getattr(model.config, key, rope.get(key)) for key in _CONFIG_KEYS}
    return {key: value for key, value in found.items() if value is not None}


def _checksum(values: Tensor) -> int:
    """Sum bf16 bit patterns, four to an int64, modulo 2⁶⁴.

    Integer sums do not depend on the order, so threads and devices agree.

    Args:
        values: [n] bfloat16, contiguous.
    """
    words = nn.functional.pad(values, (0, -values.numel() % 4)).view(torch.int64)
    return int(words.sum())
