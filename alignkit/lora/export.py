"""Write an adapted model for others to read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal, Protocol, get_args

from torch import nn
from transformers import PreTrainedModel

from alignkit.errors import AlignkitError
from alignkit.lora.files import CONFIG_FILE
from alignkit.lora.inject import adapter_configs
from alignkit.lora.io import save_adapter, save_adapter_file
from alignkit.lora.merge import merged_plain
from alignkit.models_dropout import own_dropout

Format = Literal["peft", "merged", "safetensors"]

ADAPTER_FILE = "adapter.safetensors"


class Saveable(Protocol):
    """Anything with transformers' ``save_pretrained``, a tokenizer."""

    def save_pretrained(self, save_directory: str) -> object:
        """Write into a directory."""


def export(
    model: nn.Module,
    directory: str | os.PathLike[str],
    to: Format = "peft",
    *,
    name: str | None = None,
    base: str | None = None,
    plain: bool = False,
    tokenizer: Saveable | None = None,
) -> Path:
    """Write a model in a form that needs no alignkit to be read.

    Args:
        model: A causal LM, with adapters or (``merged`` only) fully fine-tuned.
        directory: Made if missing.
        to: ``peft``: the adapter in PEFT's directory format. ``merged``: a transformers directory
            of the whole model with the adapter folded in, which ``AutoModelForCausalLM``, vLLM,
            lm-eval and llama.cpp's converter read. ``safetensors``: the adapter as the one file
            ``adapter.safetensors``, PEFT's tensors with PEFT's config in the header; `load_adapter`
            reads it too.
        name: The adapter, for ``peft`` and ``safetensors``; the active one by default. ``merged``
            writes the model as it answers now.
        base: Recorded as the adapter's base model.
        plain: Write a PiSSA or OLoRA adapter as ordinary LoRA of twice the rank, for readers such
            as vLLM that take every adapter for ordinary.
        tokenizer: Saved beside a merged model.

    Returns:
        The directory.

    Raises:
        AlignkitError: An unknown format, a model without adapters, or an option that the format
            cannot express.
    """
    directory = Path(directory)
    if to not in get_args(Format):
        raise AlignkitError(f"export: to is {to!r}; choose one of {', '.join(get_args(Format))}")
    if to == "peft":
        return save_adapter(model, directory, name=name, base=base, plain=plain)
    if to == "safetensors":
        return save_adapter_file(model, directory / ADAPTER_FILE, name=name, base=base, plain=plain)
    if not isinstance(model, PreTrainedModel):
        raise AlignkitError(
            f"export: {type(model).__name__} is no transformers model; 'merged' writes those only"
        )
    if (directory / CONFIG_FILE).exists():
        raise AlignkitError(
            f"export: {directory} holds an adapter, which transformers would add to the merged "
            "model; choose another directory"
        )
    directory.mkdir(parents=True, exist_ok=True)
    with own_dropout(model):
        if adapter_configs(model):
            with merged_plain(model):
                # The class's own: a model with adapters refuses (see `inject_lora`).
                type(model).save_pretrained(model, directory)
        else:
            model.save_pretrained(directory)
    if tokenizer is not None:
        tokenizer.save_pretrained(str(directory))
    return directory
