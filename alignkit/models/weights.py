"""Read a base's weights into a model: whole, or all but its blocks, for a run that shards them.

transformers reads the files either way, so that names, tied weights, buffers and dtypes are as
always. For the blocks it is handed stand-ins, one row of NaN each, repeated without taking memory.
A parameter that is such a stand-in unchanged is deferred (`alignkit.utils.deferred`). Where one was
converted, the base is read whole.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from alignkit.engine.fp32 import outermost_blocks
from alignkit.utils.deferred import defer

log = logging.getLogger(__name__)

# Upstream's signatures are partly untyped.
_CausalLM: Any = AutoModelForCausalLM
_shard_files: Any = get_checkpoint_shard_files
_DEFERS: ContextVar[bool] = ContextVar("defers", default=False)


@contextmanager
def deferred_blocks(wanted: bool = True) -> Iterator[None]:
    """Keep the weights of decoder blocks in their files, for every model that is loaded inside.

    Such a model can be scored as it is. A trainer whose strategy shards gives each process its part
    of one block after the other; any other makes the model whole.
    """
    token = _DEFERS.set(wanted)
    try:
        yield
    finally:
        _DEFERS.reset(token)


def read_weights(
    location: str, config: PretrainedConfig, dtype: torch.dtype, options: Mapping[str, Any]
) -> tuple[PreTrainedModel, list[str]]:
    """Return a model with a base's weights, and the names of parameters that its files lack.

    Args:
        location: What ``from_pretrained`` takes.
        config: The base's config.
        dtype: Of every parameter.
        options: Further arguments of ``from_pretrained``.
    """
    if _DEFERS.get():
        why = "only safetensors are read block by block"
        files = {} if "gguf_file" in options else _files_of_keys(location, options)
        if files:
            found = _read_but_blocks(location, config, dtype, files)
            if found is not None:
                return found
            why = "its blocks' weights are converted or missing"
        log.info("%s: held whole by each process until it is sharded, as %s", location, why)
    model, info = _CausalLM.from_pretrained(
        location,
        dtype=dtype,
        trust_remote_code=False,
        use_safetensors=True,
        output_loading_info=True,
        **options,
    )
    return model, sorted(info["missing_keys"])


def _files_of_keys(location: str, options: Mapping[str, Any]) -> dict[str, str]:
    """Return the file of each tensor, as transformers looks for them; none where it has others."""

    def found(name: str) -> str | None:
        file: str | None = cached_file(
            location, name, _raise_exceptions_for_missing_entries=False, **options
        )
        return file

    one = found(SAFE_WEIGHTS_NAME)
    files: list[str] = [one] if one is not None else []
    if one is None and (index := found(SAFE_WEIGHTS_INDEX_NAME)):
        files = _shard_files(location, index, **options)[0]
    keys: dict[str, str] = {}
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            keys.update(dict.fromkeys(tensors.keys(), file))
    return keys


def _read_but_blocks(
    location: str, config: PretrainedConfig, dtype: torch.dtype, files: Mapping[str, str]
) -> tuple[PreTrainedModel, list[str]] | None:
    """Read all but the blocks, whose parameters are deferred; ``None`` where that is not exact."""
    with torch.device("meta"):
        empty = _CausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    prefix = f"{empty.base_model_prefix}."
    key_of = {
        name: key
        for names in _blocks(empty).values()
        for name in names.values()
        for key in (name.removeprefix(prefix), name)
        if key in files
    }
    if getattr(type(config), "extra_files", ()) or not key_of:
        return None
    try:
        generation: Any = GenerationConfig.from_pretrained(location)
    except OSError:
        generation = None
    with ExitStack() as stack:
        opened = {
            file: stack.enter_context(safe_open(file, framework="pt"))
            for file in set(files.values())
        }
        state: dict[str, Any] = {key: opened[file].get_slice(key) for key, file in files.items()}
        for key in key_of.values():
            state[key] = _stand_in(state[key].get_shape(), dtype)
        # A class of transformers' own, since the automatic one copies its arguments.
        model, info = type(empty).from_pretrained(
            None,
            config=config,
            dtype=dtype,
            state_dict=state,
            generation_config=generation,
            output_loading_info=True,
        )
    model.config.name_or_path = model.name_or_path = location
    named = dict(model.named_parameters())
    blocks = _blocks(model)
    inside = [name for names in blocks.values() for name in names.values()]
    if not all(n in key_of and _is_same(named[n], state[key_of[n]]) for n in inside):
        return None
    for block, names in blocks.items():
        keys = {own: key_of[name] for own, name in names.items()}
        defer(block, {own: partial(_read, files[key], key) for own, key in keys.items()})
    return model, sorted(info["missing_keys"])


def _blocks(model: nn.Module) -> dict[nn.Module, dict[str, str]]:
    """Return a model's blocks, each with its parameters' names within it and in the model."""
    full = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        block: {own: full[id(parameter)] for own, parameter in block.named_parameters()}
        for block in outermost_blocks(model)
    }


def _stand_in(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.full((shape[-1] if shape else 1,), math.nan, dtype=dtype).expand(tuple(shape))


def _is_same(parameter: Tensor, stand_in: Tensor) -> bool:
    """Tell whether a parameter is a stand-in as it was given: neither cast, turned nor joined."""
    there = parameter.data_ptr() == stand_in.data_ptr()
    return there and parameter.shape == stand_in.shape and parameter.stride() == stand_in.stride()


def _read(file: str, key: str) -> Tensor:
    with safe_open(file, framework="pt") as tensors:
        value: Tensor = tensors.get_tensor(key)
    return value
