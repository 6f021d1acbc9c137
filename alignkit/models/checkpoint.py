"""Read small checkpoints, which hold what training changed, and load the models they belong to.

A checkpoint holds the policy's trainable parameters, optimizer and loops, and no frozen weights of
the base, which its stamp names. Everything loads with ``weights_only=True``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from alignkit.errors import AlignkitError
from alignkit.lora import LoRAConfig, inject_lora, load_adapter
from alignkit.lora.adapter import FROZEN
from alignkit.lora.identity import active_identity
from alignkit.lora.peft_files import CONFIG_FILE, read_adapter
from alignkit.lora.resize import resize_embeddings, rows_before
from alignkit.lora.state import refuse_differences
from alignkit.models.embedding import refuse_small_embedding
from alignkit.models.find import find_checkpoint, load_checkpoint
from alignkit.models.fingerprint import PACKED_FROM, QUANTIZE, base_identity
from alignkit.models.load import load_model, load_tokenizer
from alignkit.models.place import as_argument, find_base
from alignkit.models.reward import attach_head, holds_reward
from alignkit.models.stamp import (
    STAMP,
    check_adapter,
    check_adapter_base,
    check_base,
    check_content,
)
from alignkit.models.text_format import TextFormat, format_in, read_format
from alignkit.models.tokenizer import vocabulary_size
from alignkit.utils.deferred import put
from alignkit.utils.phases import phase

_MODEL_PREFIX = "model."


def trainable_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters that training changes, by name; a tied parameter appears once.

    The start that PiSSA or OLoRA subtracts from the base is included. If it were computed again,
    from a base in another dtype or by another library's decomposition, it would not be the same.
    """
    named = dict(model.named_parameters())
    return {
        name: p.detach()
        for name, p in named.items()
        if p.requires_grad or _is_subtracted_start(name, named)
    }


def _is_subtracted_start(name: str, named: Mapping[str, Tensor]) -> bool:
    adapter, _, parameter = name.rpartition(".")
    return parameter in FROZEN and named[f"{adapter}.lora_A"].requires_grad


def model_state(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return a checkpoint's policy parameters under the model's own names."""
    state: Mapping[str, Tensor] = checkpoint["state_dict"]
    return {
        n.removeprefix(_MODEL_PREFIX): v for n, v in state.items() if n.startswith(_MODEL_PREFIX)
    }


def load_trainable(model: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    """Load a state into the model's `trainable_state`, which it must match exactly.

    Raises:
        AlignkitError: Names or shapes differ. The line starts with ``what``, and the model is
            unchanged.
    """
    own = trainable_state(model)
    refuse_differences(state, {name: tuple(value.shape) for name, value in own.items()}, what)
    parameters = dict(model.named_parameters())
    for name in own:
        put(parameters[name], state[name])


def embedding_rows(checkpoint: Mapping[str, Any]) -> int:
    """Return how many rows a checkpoint's embeddings were resized to; 0 for its base's own."""
    return int(checkpoint["hyper_parameters"].get("resize_embeddings") or 0)


def read_checkpoint(path: str | Path, *, whole: bool = True) -> dict[str, Any]:
    """Read one of our checkpoints, or the newest one in a run's folder, without unpickling objects.

    Args:
        path: The file or folder.
        whole: Whether to read tensors that lie in shards too, see `load_checkpoint`.

    Raises:
        AlignkitError: The file is missing or damaged, holds more than plain values and tensors,
            holds numbers that are not finite, or was not written by this alignkit.
    """
    checkpoint = load_checkpoint(path, whole=whole)
    check_content(checkpoint, str(path))
    return checkpoint


def load_policy(
    path: str,
    base: str | None = None,
    dtype: torch.dtype = torch.float32,
    *,
    reward: bool = False,
    argument: str = "model",
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a trained or a plain model for generation and export.

    Args:
        path: A ``.ckpt`` of ours, a run's folder, a PEFT adapter directory, or anything
            `load_model` takes.
        base: Where the base model lies now, if not where the checkpoint or adapter says.
        dtype: Of the base's weights.
        reward: Whether a reward model's checkpoint is wanted, and nothing else.
        argument: What gave the path, for the line about one that is missing.

    Returns:
        The model in eval mode on the CPU, adapters active, and its base's tokenizer.

    Raises:
        AlignkitError: Something is missing, damaged, or does not fit its base.
    """
    path = find_checkpoint(path)
    if base not in (None, path) and not path.endswith(".ckpt") and not is_adapter(path):
        raise AlignkitError(
            f"{path}: is no checkpoint or adapter, which --base could belong to; mend the path, or "
            "leave --base out"
        )
    with phase(f"loading {path}"), as_argument(argument, path):
        return _load_policy(path, base or policy_base(path), dtype, reward)


def _load_policy(
    path: str, base: str, dtype: torch.dtype, reward: bool
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    tokenizer = base
    # A base rounded to float16 would no longer be the one that a checkpoint names.
    first = torch.float32 if dtype == torch.float16 else dtype
    if path.endswith(".ckpt"):
        checkpoint = read_checkpoint(path)
        hparams = checkpoint["hyper_parameters"]
        if holds_reward(checkpoint) is not reward:
            raise AlignkitError(
                f"{path}: is a language model, without the head of a reward model"
                if reward
                else f"{path}: is a reward model, which answers nothing; write it with `alignkit "
                "export --to reward`"
            )
        tokenizer = hparams.get("tokenizer") or base
        # The whole model lies in the checkpoint if it was trained in full from random weights.
        from_scratch = bool(hparams["random_init"]) and hparams["lora"] is None
        packed = checkpoint[STAMP]["base_settings"].get(QUANTIZE)
        if packed is not None:  # what was packed were the values of this dtype
            first = getattr(torch, hparams.get("dtype", "float32"))
        model = load_model(base, dtype=first, random_init=from_scratch, quantize=packed)
        check_base(base_identity(model), checkpoint[STAMP], path, weights=not from_scratch)
        resize_embeddings(model, embedding_rows(checkpoint))
        if hparams["lora"] is None:
            model.requires_grad_(True)
        else:
            model = inject_lora(model, LoRAConfig.from_dict(hparams["lora"]))
        check_adapter(active_identity(model), checkpoint[STAMP], path)
        if reward:
            attach_head(model)
        load_trainable(model, model_state(checkpoint), path)
    elif reward:
        raise AlignkitError(f"{path}: is no checkpoint of a reward model")
    elif is_adapter(path):
        header = read_adapter(Path(path)).header
        packed = header.get(QUANTIZE)
        if PACKED_FROM in header:
            first = torch.bfloat16 if header[PACKED_FROM] == "bfloat16" else torch.float32
        model = load_model(base, dtype=first, quantize=packed)  # type: ignore[arg-type]
        check_adapter_base(base_identity(model), Path(path), path)
        # An adapter on tied embeddings was trained with them untied.
        load_adapter(model, path, untie=True)
        if rows_before(model) is not None and (Path(path) / "tokenizer.json").is_file():
            tokenizer = path  # it has tokens that the base's lacks
    else:
        model = load_model(base, dtype=first)
    nn.Module.to(model, dtype)  # transformers' own override has no usable type
    loaded = load_tokenizer(tokenizer)
    refuse_small_embedding(model, vocabulary_size(loaded), tokenizer, base)
    return model.requires_grad_(False).train(False), loaded


def add_policy(model: PreTrainedModel, path: str, name: str) -> bool:
    """Add the adapter of a checkpoint to a model, and make it the active one.

    Args:
        model: The base of the checkpoint, with or without other adapters.
        path: As in `load_policy`.
        name: What to call the adapter.

    Returns:
        Whether there was an adapter; without one the model is unchanged.

    Raises:
        AlignkitError: Something is missing, damaged, or belongs to another base.
    """
    path = find_checkpoint(path)
    if is_adapter(path):
        check_adapter_base(base_identity(model), Path(path), path)
        load_adapter(model, path, name=name, untie=True, trainable=False)
        return True
    if not path.endswith(".ckpt"):
        return False
    checkpoint = read_checkpoint(path)
    settings = checkpoint["hyper_parameters"]["lora"]
    if settings is None:
        return False
    check_base(base_identity(model), checkpoint[STAMP], path)
    inject_lora(model, LoRAConfig.from_dict(settings), name)
    check_adapter(active_identity(model), checkpoint[STAMP], path)
    state = {key.replace(".default.", f".{name}."): v for key, v in model_state(checkpoint).items()}
    load_trainable(model, state, path)
    return True


def policy_base(path: str) -> str:
    """Return where the base of a checkpoint or adapter lies; any other path is a base itself.

    Raises:
        AlignkitError: The file is unreadable, or is an adapter that names no base; or the base has
            moved.
    """
    path = find_checkpoint(path)
    named, kept = base_record(path)
    return find_base(named, kept, path) if kept is not None else named


def base_record(path: str) -> tuple[str, Mapping[str, str] | None]:
    """Return the base as a checkpoint or adapter names it, and what else it says of its place.

    The latter is ``None`` for any other path, which is a base itself.

    Raises:
        AlignkitError: The file is unreadable, or is an adapter that names no base.
    """
    path = find_checkpoint(path)
    if path.endswith(".ckpt"):
        stamp = read_checkpoint(path, whole=False)[STAMP]
        return str(stamp["base"]), stamp
    if is_adapter(path):
        files = read_adapter(Path(path))
        base = files.config.get("base_model_name_or_path")
        if not base:
            raise AlignkitError(f"{path}: names no base model; pass it as --base")
        return str(base), files.header
    return path, None


def policy_format(path: str) -> TextFormat | None:
    """Return the text format that a checkpoint, adapter or export was trained with.

    Returns:
        ``None`` where none is recorded: for a plain model, or a run with its own data module.

    Raises:
        AlignkitError: The file is unreadable.
    """
    path = find_checkpoint(path)
    if path.endswith(".ckpt"):
        return format_in(read_checkpoint(path, whole=False), path)
    return read_format(Path(path))


def is_adapter(path: str | Path) -> bool:
    """Return whether a path is an adapter in PEFT's format: its directory, or one file."""
    path = Path(path)
    return (path / CONFIG_FILE).is_file() or (path.suffix == ".safetensors" and path.is_file())
