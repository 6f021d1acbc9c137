"""A content-based name for a frozen base model."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import xxhash
from torch import Tensor
from transformers import PreTrainedModel

from alignkit.lora.adapter import plain_modules
from alignkit.models.quantize import quantization
from alignkit.models.settings import function_settings, setting_defaults

_CHUNK = 2**20
# With the fingerprint's version: what another version computes cannot be compared.
QUANTIZE = "alignkit_quantize"
"""Key of what a base's linear layers are packed as, in its settings and in files' headers."""
_HEADER_KEY = "alignkit_base_2"


@dataclass(frozen=True)
class BaseIdentity:
    """What a base model is.

    Attributes:
        fingerprint: See `base_fingerprint`.
        settings: See `function_settings`; part of the fingerprint, and kept to say what differs.
        defaults: See `setting_defaults`.
    """

    fingerprint: str
    settings: Mapping[str, Any]
    defaults: Mapping[str, Any]

    def header(self) -> dict[str, str]:
        """Return what an adapter file's header says of its base."""
        packed = self.settings.get(QUANTIZE)
        return {_HEADER_KEY: self.fingerprint, **({QUANTIZE: packed} if packed else {})}

    def is_named_in(self, header: Mapping[str, str]) -> bool:
        """Return whether a header names this base, or none: PEFT's own files do not."""
        return header.get(_HEADER_KEY, self.fingerprint) == self.fingerprint


def base_identity(model: PreTrainedModel) -> BaseIdentity:
    """Return the identity of a base, adapters injected or not."""
    settings, defaults = function_settings(model.config), setting_defaults(model.config)
    packed = quantization(model)
    if packed is not None:
        settings = {**settings, QUANTIZE: packed}
    return BaseIdentity(base_fingerprint(model), settings, defaults)


def base_fingerprint(model: PreTrainedModel) -> str:
    """Return 32 hex digits that name the function a base model computes.

    Adapters, checkpoints and cached log-probs carry it, so that none is ever put on another base.
    It is a hash of the config's `function_settings`, and of the name, shape and every value of each
    parameter and persistent buffer. Numbers are rounded to bfloat16 first, so that a checkpoint
    stored in bfloat16 or float32 has one fingerprint whether it is loaded in bfloat16 or float32;
    loading in float16 rounds differently and gives another. Adapters are left out, so injecting
    them changes nothing; merging them into the weights does.

    What it does not see: a change below bfloat16's 8 bits. It guards against mistakes, not against
    a forger.

    Args:
        model: The base, adapters injected or not.
    """
    digest = xxhash.xxh3_128()
    digest.update(json.dumps(function_settings(model.config), sort_keys=True).encode())
    for name, tensor in sorted(_base_tensors(model), key=lambda pair: pair[0]):
        values = tensor.detach()
        kind = "" if values.is_floating_point() else values.dtype
        digest.update(f"\n{name} {tuple(values.shape)} {kind}".encode())
        for chunk in torch.split(values.reshape(-1), _CHUNK):
            if chunk.is_floating_point():
                chunk = chunk.to(torch.bfloat16)
            digest.update(chunk.contiguous().cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _base_tensors(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Yield parameters and persistent buffers by their names without adapters, shared ones once."""
    seen: set[int] = set()
    for path, module in plain_modules(model).items():
        kept = [
            (name, buffer)
            for name, buffer in module.named_buffers(recurse=False)
            if name not in module._non_persistent_buffers_set
        ]
        for name, tensor in (*module.named_parameters(recurse=False), *kept):
            if id(tensor) not in seen:
                seen.add(id(tensor))
                yield f"{path}.{name}" if path else name, tensor
