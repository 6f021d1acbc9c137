"""Read and write PEFT's adapter files; damaged files are refused, and writes are atomic."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from alignkit.errors import AlignkitError
from alignkit.utils.atomic import write_atomically

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
CONFIG_KEY = "adapter_config"


class AdapterFiles(NamedTuple):
    """Hold the content of an adapter's directory or file.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as place:
        ...     path = Path(place, "adapter.safetensors")
        ...     write_tensors(path, {"lora_A": torch.ones(2, 3)}, {CONFIG_KEY: '{"r": 2}'})
        ...     read_adapter(path).config
        {'r': 2}

    Attributes:
        config: PEFT's settings.
        tensors: The tensors by PEFT's names, on the CPU.
        header: The header of the tensors' file.
        config_path: Where the settings are, for messages.
        tensors_path: Where the tensors are, for messages.
    """

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    header: dict[str, str]
    config_path: str
    tensors_path: str


def read_adapter(path: Path) -> AdapterFiles:
    """Read a PEFT directory, or one ``.safetensors`` file with the config in its header.

    Raises:
        AlignkitError: Files missing, damaged, not JSON, or leading outside the directory.
    """
    if path.is_file():
        tensors, header = read_tensors(path)
        if CONFIG_KEY not in header:
            raise AlignkitError(f"{path}: its header holds no adapter config; give its directory")
        where = f"{path} (header)"
        return AdapterFiles(_parse(header[CONFIG_KEY], where), tensors, header, where, str(path))
    config_path, tensors_path = _inside(path, CONFIG_FILE), _inside(path, WEIGHTS_FILE)
    config = _parse(config_path.read_bytes(), str(config_path))
    tensors, header = read_tensors(tensors_path)
    return AdapterFiles(config, tensors, header, str(config_path), str(tensors_path))


def _parse(text: str | bytes, path: str) -> dict[str, Any]:
    try:
        raw = json.loads(text)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise AlignkitError(f"{path}: not JSON ({error}); save the adapter again") from None
    if not isinstance(raw, dict):
        raise AlignkitError(f"{path}: holds a {type(raw).__name__}, not an object of settings")
    return raw


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of a safetensors file, on the CPU, and its header.

    Raises:
        AlignkitError: The file is cut short or altered, or holds NaN, infinity or integers.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            # Copies: what safetensors returns stays mapped to the file, and Windows replaces no
            # file that is mapped.
            tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
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
    return tensors, metadata


def write_tensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> None:
    """Write tensors with a checksum in the header, where other readers ignore it."""
    tensors = dict(sorted(tensors.items()))
    metadata = {"format": "pt", "sha256": digest(tensors), **header}
    write_atomically(path, save(tensors, metadata=metadata))


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Return a SHA-256 over the names, dtypes, shapes and bytes of tensors."""
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
