"""Small checkpoints: what training changed, stamped with what it belongs to.

A checkpoint holds the policy's trainable parameters, optimizer and loop state, never frozen base
weights; the stamp names the module's class, its base and, for DPO, its reference. Everything
loads with ``weights_only=True``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from alignkit.data.text_format import TextFormat, read_format
from alignkit.data.tokens import vocabulary_size
from alignkit.errors import AlignkitError
from alignkit.lora import LoRAConfig, inject_lora, load_adapter
from alignkit.lora.files import read_adapter
from alignkit.lora.state import refuse_differences
from alignkit.models import base_fingerprint, load_model, load_tokenizer
from alignkit.modules.find import find_checkpoint, load_checkpoint
from alignkit.modules.text import format_in, refuse_small_embedding

STAMP = "alignkit"
_PREFIX = "model."


def trainable_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters that training changes, by name; a tied parameter appears once."""
    return {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}


def model_state(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return a checkpoint's policy parameters under the model's own names."""
    state: Mapping[str, Tensor] = checkpoint["state_dict"]
    return {n.removeprefix(_PREFIX): v for n, v in state.items() if n.startswith(_PREFIX)}


def load_trainable(model: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    """Copy a state into the model's trainable parameters, which it must match exactly.

    Raises:
        AlignkitError: Names or shapes differ; one line that starts with ``what``. The model is
            then unchanged.
    """
    own = trainable_state(model)
    refuse_differences(state, {name: tuple(value.shape) for name, value in own.items()}, what)
    for name, value in own.items():
        value.copy_(state[name])


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read one of our checkpoints, or the newest one in a run's folder, without unpickling objects.

    Raises:
        AlignkitError: The file is missing, damaged, holds more than plain values and tensors, or
            was not written by alignkit.
    """
    checkpoint = load_checkpoint(path)
    if STAMP not in checkpoint:
        raise AlignkitError(f"{path}: was not written by alignkit; give one of its checkpoints")
    return checkpoint


def check_stamp(own: Mapping[str, str], given: Mapping[str, str] | None) -> None:
    """Refuse to resume from a checkpoint of another class, base or reference.

    Raises:
        AlignkitError: They differ; the message says what to pass instead.
    """
    if given is None:
        raise AlignkitError("ckpt_path: was not written by alignkit; give one of its checkpoints")
    if given["module"] != own["module"]:
        theirs, ours = (stamp["module"].rpartition(".")[2] for stamp in (given, own))
        raise AlignkitError(
            f"ckpt_path: a checkpoint of {theirs} cannot resume {ours}; to start {ours} from its "
            "weights pass it as model.init_from"
        )
    _check_base(own["base_fingerprint"], given, "ckpt_path")
    if given.get("reference_fingerprint") != own.get("reference_fingerprint"):
        raise AlignkitError(
            "ckpt_path: was trained against another reference; resume with the model.init_from "
            "that the run started with"
        )


def load_weights(
    model: PreTrainedModel, path: str, fingerprint: str, untie: bool = False
) -> TextFormat | None:
    """Start from a checkpoint of any stage, from a run's newest, or from a PEFT adapter directory.

    Args:
        model: Built like the one that was saved: the same base and the same LoRA settings.
        path: A ``.ckpt`` file of ours, a run's folder, or one with ``adapter_config.json``.
        fingerprint: The base's, to hold against the checkpoint's.
        untie: Let a PEFT adapter change one side of tied embeddings.

    Returns:
        How the text was put that the weights were trained on, where they say so.

    Raises:
        AlignkitError: Missing, damaged, of another base or of other LoRA settings; the model is
            unchanged.
    """
    path = find_checkpoint(path)
    if Path(path).is_dir():
        load_adapter(model, path, untie=untie)
        return read_format(Path(path))
    checkpoint = read_checkpoint(path)
    _check_base(fingerprint, checkpoint[STAMP], f"init_from {path}")
    load_trainable(model, model_state(checkpoint), f"init_from {path}")
    return format_in(checkpoint, f"init_from {path}")


def load_policy(
    path: str, base: str | None = None, dtype: torch.dtype = torch.float32
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load what a run made, or a plain model, for generation and export.

    Args:
        path: A ``.ckpt`` of ours, a run's folder, a PEFT adapter directory, or anything
            `load_model` takes.
        base: Where the base model lies now, if not where the checkpoint or adapter says.
        dtype: Of the base's weights.

    Returns:
        The model in eval mode on the CPU, adapters active, and its base's tokenizer.

    Raises:
        AlignkitError: Something is missing, damaged, or does not fit its base.
    """
    path = find_checkpoint(path)
    base = base or policy_base(path)
    tokenizer = base
    if path.endswith(".ckpt"):
        checkpoint = read_checkpoint(path)
        hparams = checkpoint["hyper_parameters"]
        tokenizer = hparams.get("tokenizer") or base
        # A model trained in full from random weights lies in the checkpoint, whole.
        from_scratch = bool(hparams["random_init"]) and hparams["lora"] is None
        model = load_model(base, dtype=dtype, random_init=from_scratch)
        if not from_scratch:
            _check_base(base_fingerprint(model), checkpoint[STAMP], path)
        if hparams["lora"] is None:
            model.requires_grad_(True)
        else:
            model = inject_lora(model, LoRAConfig.from_dict(hparams["lora"]))
        load_trainable(model, model_state(checkpoint), path)
    elif _is_adapter(path):
        # Whoever trained it chose to untie, where it touches tied embeddings.
        model = load_adapter(load_model(base, dtype=dtype), path, untie=True)
    else:
        model = load_model(base, dtype=dtype)
    loaded = load_tokenizer(tokenizer)
    refuse_small_embedding(model, vocabulary_size(loaded), tokenizer, base)
    return model.requires_grad_(False).train(False), loaded


def policy_base(path: str) -> str:
    """Return where the base of a checkpoint or adapter lies; any other path is a base itself.

    Raises:
        AlignkitError: The file is unreadable, or an adapter that names no base.
    """
    path = find_checkpoint(path)
    if path.endswith(".ckpt"):
        return str(read_checkpoint(path)[STAMP]["base"])
    if _is_adapter(path):
        base = read_adapter(Path(path)).config.get("base_model_name_or_path")
        if not base:
            raise AlignkitError(f"{path}: names no base model; pass it as base")
        return str(base)
    return path


def policy_format(path: str) -> TextFormat | None:
    """Return how the text was put that a checkpoint, adapter or export was trained on.

    Returns:
        ``None`` where it says nothing: a plain model, or a run with data of its own.

    Raises:
        AlignkitError: The file is unreadable.
    """
    path = find_checkpoint(path)
    if path.endswith(".ckpt"):
        return format_in(read_checkpoint(path), path)
    return read_format(Path(path))


def _is_adapter(path: str) -> bool:
    return (Path(path) / "adapter_config.json").is_file()


def tensors_fingerprint(state: Mapping[str, Tensor]) -> str:
    """Return 32 hex digits over names, shapes and exact values of trained tensors.

    A factor A whose B is zero changes nothing and is left out: every untrained adapter has the
    fingerprint of its base, whatever A was drawn.
    """
    digest = hashlib.sha256()
    for name in sorted(state):
        partner = state.get(name.replace("lora_A", "lora_B"))
        if "lora_A" in name and partner is not None and not partner.any():
            continue
        value = state[name].detach().cpu().contiguous()
        digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]


def random_state(device: torch.device) -> dict[str, Tensor]:
    """Return torch's random states on the host and on the device."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def of_all_ranks(state: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Return every rank's `random_state`; a collective that all of them call."""
    if not (dist.is_available() and dist.is_initialized()):
        return [state]
    states: list[dict[str, Tensor]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(states, state)
    return states


def restore_random_state(
    states: Sequence[Mapping[str, Tensor]] | Mapping[str, Tensor], device: torch.device, rank: int
) -> None:
    """Restore this rank's state of `of_all_ranks`.

    A rank that the saving run did not have draws a stream of its own.
    """
    if isinstance(states, Mapping):  # of an earlier alignkit: rank 0's alone
        states = [states]
    state = states[min(rank, len(states) - 1)]
    torch.set_rng_state(state["cpu"].cpu())
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)
    if rank >= len(states):
        torch.manual_seed(int(torch.randint(2**62, ())) + rank)


def _check_base(fingerprint: str, stamp: Mapping[str, str], where: str) -> None:
    if stamp["base_fingerprint"] != fingerprint:
        raise AlignkitError(
            f"{where}: belongs to another base model (trained on {stamp['base']!r}); pass that one "
            "as model.base"
        )
