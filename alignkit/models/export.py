"""Write an adapted model in formats that other programs read."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Any, Literal, get_args

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from alignkit.errors import AlignkitError
from alignkit.lora.inject import adapter_configs
from alignkit.lora.io import save_adapter, save_adapter_file
from alignkit.lora.merge import merged_plain
from alignkit.lora.peft_files import CONFIG_FILE
from alignkit.lora.state import refuse_differences
from alignkit.models.dropout import own_dropout
from alignkit.models.gguf_file import GGUF_FILE, need_gguf, write_gguf
from alignkit.models.readback import refuse_other_answers
from alignkit.utils.atomic import share_files
from alignkit.utils.bars import without_bars
from alignkit.utils.finite import refuse_nonfinite_weights

Format = Literal["peft", "merged", "safetensors", "gguf"]

ADAPTER_FILE = "adapter.safetensors"


def export(
    model: nn.Module,
    directory: str | os.PathLike[str],
    to: Format = "peft",
    *,
    name: str | None = None,
    base: str | None = None,
    plain: bool = False,
    tokenizer: PreTrainedTokenizerBase | None = None,
    header: Mapping[str, str] = MappingProxyType({}),
) -> Path:
    """Write a model in a format that is read without alignkit.

    Args:
        model: A causal LM, with adapters or (``merged`` only) fully fine-tuned.
        directory: Made if missing.
        to: ``peft``: the adapter in PEFT's directory format. ``merged``: a transformers directory
            of the whole model with the adapter folded in, which ``AutoModelForCausalLM``, vLLM,
            lm-eval and llama.cpp's converter read. ``safetensors``: the adapter as the one file
            ``adapter.safetensors``, PEFT's tensors with PEFT's config in the header; `load_adapter`
            reads it too. ``gguf``: the merged model and its tokenizer as the one file
            ``model.gguf``, for llama.cpp and Ollama.
        name: The adapter, for ``peft`` and ``safetensors``; the active one by default. ``merged``
            and ``gguf`` write the model with the adapters that are active.
        base: Recorded as the adapter's base model.
        plain: Write a PiSSA or OLoRA adapter as ordinary LoRA of twice the rank, for readers such
            as vLLM that take every adapter for ordinary.
        tokenizer: Saved beside a merged model; part of a GGUF file, which needs one.
        header: Further entries of an adapter file's header.

    Returns:
        The directory.

    Raises:
        AlignkitError: The format is unknown or cannot express an option, the model has no adapters
            or numbers that are not finite, or transformers would not read back all parameters.
    """
    directory = Path(directory)
    if to not in get_args(Format):
        raise AlignkitError(f"export: to is {to!r}; choose one of {', '.join(get_args(Format))}")
    if to == "peft":
        return save_adapter(model, directory, name=name, base=base, plain=plain, header=header)
    if to == "safetensors":
        place = directory / ADAPTER_FILE
        return save_adapter_file(model, place, name=name, base=base, plain=plain, header=header)
    if not isinstance(model, PreTrainedModel):
        raise AlignkitError(
            f"export: {type(model).__name__} is no transformers model; {to!r} writes those only"
        )
    if (directory / CONFIG_FILE).exists():
        raise AlignkitError(
            f"export: {directory} holds an adapter, which transformers would add to the merged "
            "model; choose another directory"
        )
    directory.parent.mkdir(parents=True, exist_ok=True)
    # Write beside the directory first. What cannot be read back never gets there.
    with TemporaryDirectory(prefix=f".{directory.name}.", dir=directory.parent) as written:
        with own_dropout(model), merged_plain(model) if adapter_configs(model) else nullcontext():
            if to == "gguf":
                _write_gguf(model, tokenizer, Path(written), directory.name)
            else:
                _write_model(model, written)
        if tokenizer is not None and to == "merged":
            tokenizer.save_pretrained(written)
        share_files(Path(written))
        directory.mkdir(exist_ok=True)
        for file in sorted(Path(written).iterdir()):
            shutil.move(file, directory / file.name)
    return directory


def _write_gguf(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, directory: Path, name: str
) -> None:
    """Write a plain model with its tokenizer, and check that transformers says the same with it."""
    if tokenizer is None:
        raise AlignkitError("export: 'gguf' holds the tokenizer as well; pass tokenizer")
    need_gguf()
    refuse_nonfinite_weights(model, "export, once merged", "use an earlier checkpoint")
    write_gguf(model, tokenizer, directory / GGUF_FILE, name)
    refuse_other_answers(model, directory, GGUF_FILE)


def _write_model(model: PreTrainedModel, directory: str) -> None:
    """Write a plain model, and check that transformers finds every parameter again."""
    refuse_nonfinite_weights(
        model, "export, once merged", "use an earlier checkpoint, or another dtype"
    )
    with without_bars():
        # Call the class's method, since a model with adapters refuses its own (see `inject_lora`).
        type(model).save_pretrained(model, directory)
        _refuse_lost_parameters(model, directory)


def _refuse_lost_parameters(model: PreTrainedModel, directory: str) -> None:
    # With accelerate installed this reads names and shapes alone.
    on = {"device_map": "meta"} if importlib.util.find_spec("accelerate") else {}
    kind: Any = type(model)
    try:
        again, info = kind.from_pretrained(
            directory, dtype=model.dtype, output_loading_info=True, use_safetensors=True, **on
        )
    except (OSError, ValueError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise AlignkitError(f"export: transformers cannot read it back: {reason}") from error
    lost = [str(name) for names in info.values() for name in names]
    if lost:
        raise AlignkitError(
            f"export: transformers reads it back without {len(lost)} of its parameters, such as "
            f"{lost[0]}; export --to peft instead"
        )
    refuse_differences(
        dict(again.named_parameters()),
        {name: tuple(parameter.shape) for name, parameter in model.named_parameters()},
        "export: what transformers reads back",
    )
