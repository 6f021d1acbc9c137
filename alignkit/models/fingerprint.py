"""Compute a name for a base model from its content."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import xxhash
from torch import Tensor
from transformers import PreTrainedModel

from alignkit.lora.adapter import plain_modules
from alignkit.lora.resize import embedding_paths, rows_before
from alignkit.models.quantize import packed_from, quantization
from alignkit.models.settings import function_settings, setting_defaults
from alignkit.utils.deferred import actual

_CHUNK_VALUES = 2**20
QUANTIZE = "alignkit_quantize"
"""Key of what a base's linear layers are packed as, in its settings and in files' headers."""
PACKED_FROM = "alignkit_packed_from"
"""Key of the dtype of the values that were packed, in files' headers."""
# The key names the version of the fingerprint, since those of other versions cannot be compared.
_HEADER_KEY = "alignkit_base_2"


@dataclass(frozen=True)
class BaseIdentity:
    """Hold what tells a base model from others.

    Example:
        >>> base = BaseIdentity(fingerprint="2f3a", settings={"n_layer": 2}, defaults={})
        >>> base.is_named_in({}), base.is_named_in({"alignkit_base_2": "9b01"})
        (True, False)

    Attributes:
        fingerprint: See `base_fingerprint`.
        settings: See `function_settings`. They are part of the fingerprint, and are kept so that
            messages can name a difference.
        defaults: See `setting_defaults`.
        packed_from: The dtype of the values that were packed; ``None`` for a plain base.
    """

    fingerprint: str
    settings: Mapping[str, Any]
    defaults: Mapping[str, Any]
    packed_from: str | None = None

    def header(self) -> dict[str, str]:
        """Return the entries of an adapter file's header that name its base."""
        named = {QUANTIZE: self.settings.get(QUANTIZE), PACKED_FROM: self.packed_from}
        return {
            _HEADER_KEY: self.fingerprint,
            **{key: value for key, value in named.items() if value},
        }

    def is_named_in(self, header: Mapping[str, str]) -> bool:
        """Return whether a header names this base, or none as in PEFT's own files."""
        return header.get(_HEADER_KEY, self.fingerprint) == self.fingerprint


def base_identity(model: PreTrainedModel) -> BaseIdentity:
    """Return the identity of a base, with or without adapters."""
    settings, defaults = _settings(model), setting_defaults(model.config)
    packed = quantization(model)
    if packed is not None:
        settings = {**settings, QUANTIZE: packed}
    return BaseIdentity(base_fingerprint(model), settings, defaults, packed_from(model))


def base_fingerprint(model: PreTrainedModel) -> str:
    """Return 32 hex digits that name the function a base model computes.

    Adapters, checkpoints and cached log-probs carry it, so that none is ever used with another
    base. It is a hash of the config's `function_settings`, and of the name, shape and every value
    of each parameter and persistent buffer. Numbers are rounded to bfloat16 first. A checkpoint
    that is stored in bfloat16 or float32 therefore has one fingerprint, whichever of the two it is
    loaded in. Loading in float16 rounds differently and gives another one. Adapters are left out,
    so that injecting them changes nothing. Merging them into the weights changes the fingerprint.

    A change below bfloat16's 8 bits is not seen. The fingerprint guards against mistakes, not
    against forgery.

    Args:
        model: The base, with or without adapters.
    """
    digest = xxhash.xxh3_128()
    digest.update(json.dumps(_settings(model), sort_keys=True).encode())
    before = rows_before(model)
    resized = embedding_paths(model) if before is not None else []
    for name, tensor in sorted(_base_tensors(model), key=lambda pair: pair[0]):
        values = actual(tensor).detach()
        if name.rpartition(".")[0] in resized:
            values = values[:before]
        kind = "" if values.is_floating_point() else values.dtype
        digest.update(f"\n{name} {tuple(values.shape)} {kind}".encode())
        for chunk in torch.split(values.reshape(-1), _CHUNK_VALUES):
            if chunk.is_floating_point():
                chunk = chunk.to(torch.bfloat16)
            digest.update(chunk.contiguous().cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _settings(model: PreTrainedModel) -> dict[str, Any]:
    """Return the config's `function_settings`, as they were before embeddings were resized."""
    before = rows_before(model)
    config = model.config
    if before is not None:
        config = copy.deepcopy(config)
        config.get_text_config().vocab_size = before
    return function_settings(config)


def _base_tensors(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Yield parameters and persistent buffers by their names without adapters, each tensor once."""
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
