"""Give a model's embeddings rows for further token ids, and tell how many an adapter has.

A resized model goes by the identity of the one it was made from: what new rows start as is decided
by the old ones, and what they became is among the weights that training changed.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from alignkit.errors import AlignkitError
from alignkit.lora.adapter import adapter_layers, plain_modules
from alignkit.lora.config import LoRAConfig
from alignkit.lora.peft_files import AdapterFiles
from alignkit.lora.peft_format import PREFIX
from alignkit.lora.targets import head_path

log = logging.getLogger(__name__)

_BEFORE = "alignkit_rows_before"


def rows_before(model: nn.Module) -> int | None:
    """Return how many rows embeddings had before `resize_embeddings`; ``None`` if as many."""
    before: int | None = getattr(model, _BEFORE, None)
    return before


def embedding_paths(model: nn.Module) -> list[str]:
    """Return the paths of the input embeddings and of the output head, where it has a weight."""
    get = getattr(model, "get_input_embeddings", None)
    inputs = get() if get is not None else None
    inputs = getattr(inputs, "base", inputs)
    paths = [path for path, module in plain_modules(model).items() if module is inputs]
    head = head_path(model)
    return [*paths, *([head] if head is not None and head not in paths else [])]


@torch.no_grad()
def resize_embeddings(model: PreTrainedModel, size: int) -> None:
    """Give the embeddings and the output head rows for ``size`` token ids, if they have fewer.

    Every new row is the mean of the old ones, so that the same base and size make the same model.

    Args:
        model: A model without adapters, changed in place.
        size: One above the largest token id.

    Raises:
        AlignkitError: The model has adapters, or cannot be resized.
    """
    paths = embedding_paths(model)
    before = len(plain_modules(model)[paths[0]].get_parameter("weight")) if paths else 0
    if size <= before:
        return
    if not paths or adapter_layers(model):
        why = "has adapters" if paths else "has no embeddings that are found"
        raise AlignkitError(f"resize_embeddings: {type(model).__name__} {why}; resize the base")
    try:
        model.resize_token_embeddings(size, mean_resizing=False)
    except (NotImplementedError, ValueError, AttributeError, RuntimeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise AlignkitError(f"resize_embeddings: {type(model).__name__}: {reason}") from error
    modules = plain_modules(model)
    for path in embedding_paths(model):
        for parameter in modules[path].parameters(recurse=False):
            if len(parameter) == size:
                parameter[before:] = parameter[:before].float().mean(0).to(parameter.dtype)
    setattr(model, _BEFORE, min(before, rows_before(model) or before))


def fit_embeddings(model: nn.Module, tensors: Mapping[str, Tensor]) -> int | None:
    """Give a model as many rows of embeddings as an adapter in PEFT's format was trained on.

    Rows that the adapter's file holds and does not train are taken from it.

    Args:
        model: The base. With adapters already, nothing is done.
        tensors: The adapter's, by PEFT's names.

    Returns:
        How many rows there were, to undo it; ``None`` where nothing was done.
    """
    if not isinstance(model, PreTrainedModel) or adapter_layers(model):
        return None
    modules = plain_modules(model)
    paths = embedding_paths(model)
    before = len(modules[paths[0]].get_parameter("weight")) if paths else 0
    size = max((_rows(tensors, path) for path in paths), default=0)
    if size <= before:
        return None
    resize_embeddings(model, size)
    modules = plain_modules(model)
    for path in embedding_paths(model):
        tied = modules[path].get_parameter("weight") is modules[paths[0]].get_parameter("weight")
        if not tied and not _rows(tensors, path):
            log.warning(
                "the adapter's file holds no rows of %s for its %d new token ids; they are the "
                "mean of the others",
                path,
                size - before,
            )
        whole = tensors.get(f"{PREFIX}{path}.base_layer.weight")
        if whole is not None and len(whole) == size:
            with torch.no_grad():
                weight = modules[path].get_parameter("weight")
                weight[before:] = whole[before:].to(weight.dtype)
    return before


def own_rows(model: nn.Module, tensors: Mapping[str, Tensor]) -> bool:
    """Tell whether an adapter's file holds new rows of the base that it does not train."""
    paths = embedding_paths(model)
    keys = (f"{PREFIX}{path}.base_layer.weight" for path in paths)
    whole = [tensors[key] for key in keys if key in tensors]
    before = rows_before(model)
    return before is not None and any(len(each) > before for each in whole)


def undo_resize(model: Any, before: int | None) -> None:
    """Undo `fit_embeddings`, whose result is ``before``."""
    if before is not None:
        model.resize_token_embeddings(before, mean_resizing=False)
        delattr(model, _BEFORE)


def with_tied(config: LoRAConfig, files: AdapterFiles, tied: list[str]) -> LoRAConfig:
    """Return a config with the modules that PEFT adapts as one with those it names.

    It writes the tensors of both sides, by which they compute what they did. Trained further, each
    side goes its own way.

    Raises:
        AlignkitError: They are not in the file.
    """
    for path in tied:
        if f"{PREFIX}{path}.weight" in files.tensors:
            config = dataclasses.replace(config, modules_to_save=(*config.modules_to_save, path))
        elif f"{PREFIX}{path}.lora_A.weight" in files.tensors:
            config = dataclasses.replace(config, targets=(*config.targets, path))
        else:
            raise AlignkitError(
                f"{files.config_path}: ensure_weight_tying adapts {path} as well, and "
                f"{files.tensors_path} holds nothing of it; train one of them alone"
            )
    return config


def _rows(tensors: Mapping[str, Tensor], path: str) -> int:
    """Return for how many token ids an adapter's file has rows at a path; 0 for none."""
    names = {"weight": 0, "base_layer.weight": 0, "lora_embedding_A": 1, "lora_B.weight": 0}
    keys = ((f"{PREFIX}{path}.{name}", dimension) for name, dimension in names.items())
    return max((tensors[key].shape[at] for key, at in keys if key in tensors), default=0)
