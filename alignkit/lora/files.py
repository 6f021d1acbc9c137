"""Adapter files: read with suspicion, written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from alignkit.errors import AlignkitError

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"


def read_config(directory: Path) -> dict[str, Any]:
    """Return ``adapter_config.json`` as a dict.

    Raises:
        AlignkitError: No such file, or no JSON object in it.
    """
    path = _inside(directory, CONFIG_FILE)
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise AlignkitError(f"{path}: not JSON ({error}); save the adapter again") from None
    if not isinstance(raw, dict):
        raise AlignkitError(f"{path}: holds a {type(raw).__name__}, not an object of settings")
    return raw


def read_tensors(directory: Path) -> dict[str, Tensor]:
    """Return the tensors of ``adapter_model.safetensors``, on the CPU.

    Raises:
        AlignkitError: No such file, or it is cut short, altered, or holds NaN or infinity.
    """
    path = _inside(directory, WEIGHTS_FILE)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise AlignkitError(
            f"{path}: damaged or no safetensors file ({error}); copy it again"
        ) from None
    if metadata.get("sha256", digest(tensors)) != digest(tensors):
        raise AlignkitError(f"{path}: its content does not match its checksum; copy it again")
    for key, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise AlignkitError(f"{path}: {key} holds {tensor.dtype}, not floating point numbers")
        if not torch.isfinite(tensor).all():
            raise AlignkitError(f"{path}: {key} holds NaN or infinity; use an earlier adapter")
    return tensors


def write_tensors(path: Path, tensors: Mapping[str, Tensor], **metadata: str) -> None:
    """Write tensors with a checksum in the header, where other readers ignore it."""
    tensors = dict(sorted(tensors.items()))
    header = {"format": "pt", "sha256": digest(tensors), **metadata}
    write_atomically(path, save(tensors, metadata=header))


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file beside its place and move it there, so that no reader sees half of it."""
    with tempfile.NamedTemporaryFile(
        dir=path.parent, prefix=f".{path.name}.", delete=False
    ) as file:
        try:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            os.chmod(file.name, 0o644)
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Return a SHA-256 over names, dtypes, shapes and bytes."""
    total = hashlib.sha256()
    for key in sorted(tensors):
        tensor = tensors[key].detach().cpu().contiguous()
        total.update(f"{key} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        total.update(tensor.view(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def _inside(directory: Path, name: str) -> Path:
    """Return a file of the directory; refuse one that is missing or a link that leads out of it."""
    if not directory.is_dir():
        raise AlignkitError(f"{directory}: no such directory; give one with {CONFIG_FILE}")
    path = directory / name
    if not path.is_file():
        hint = ""
        if (directory / "adapter_model.bin").exists():
            hint = "; adapter_model.bin is a pickle and never opened: save it as safetensors"
        raise AlignkitError(f"{path}: no such file{hint or '; give a PEFT adapter directory'}")
    allowed = [directory.resolve()]
    if directory.resolve().parent.name == "snapshots":  # the Hub's cache links into its blobs
        allowed.append(directory.resolve().parent.parent / "blobs")
    if not any(path.resolve().is_relative_to(root) for root in allowed):
        raise AlignkitError(f"{path}: leads outside its directory, to {path.resolve()}; copy it in")
    return path
