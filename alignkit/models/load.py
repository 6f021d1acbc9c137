"""Load a base model and its tokenizer: from the Hub, a directory, a GGUF file, or a config.

Every loader takes one string and either returns a working object or raises one line that says
what was given, what is wrong with it and what to pass instead. Weights come from safetensors or
GGUF only: nothing is unpickled, and no code from a model repository is run.
"""

from __future__ import annotations

import importlib.util
import logging
import re
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants as hub
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from alignkit.errors import AlignkitError
from alignkit.models.fingerprint import base_fingerprint
from alignkit.models.lean import lean_modules
from alignkit.models.quantize import Quantization, need_bitsandbytes
from alignkit.models.quantize import quantize as pack
from alignkit.models.weights import read_weights
from alignkit.utils.bars import without_bars
from alignkit.utils.deferred import hold
from alignkit.utils.finite import refuse_nonfinite_weights

__all__ = [
    "base_fingerprint",
    "embedding_size",
    "hub_reachable",
    "load_model",
    "load_tokenizer",
    "read_config",
    "stored_dtype",
]

log = logging.getLogger(__name__)

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_HUB_TIMEOUT_S = 5.0
_LOCAL = "a local model directory or a .gguf file"
_ADVICE = f"pass a Hub id, {_LOCAL}"
# Upstream's signatures are partly untyped.
_CausalLM: Any = AutoModelForCausalLM
# What transformers, safetensors and gguf raise over a bad file; anything else is a bug of ours.
_LOAD_ERRORS = (
    OSError,
    ValueError,
    RuntimeError,
    LookupError,
    AttributeError,
    TypeError,
    ImportError,
    SafetensorError,
)


def load_model(
    base: str,
    *,
    dtype: torch.dtype = torch.float32,
    random_init: bool = False,
    quantize: Quantization | None = None,
) -> PreTrainedModel:
    """Load a causal language model in eval mode on the CPU.

    Args:
        base: A Hub id, a local directory, a ``.gguf`` file (dequantized on loading) or, with
            ``random_init``, a directory or JSON file that holds a config alone.
        dtype: Of every parameter. Always explicit: transformers' own default follows the
            checkpoint, which would quietly train bf16 checkpoints without fp32 weights.
        random_init: Draw fresh weights from torch's global generator (seed it first) instead
            of reading any.
        quantize: Pack the linear layers, see `alignkit.models.quantize`.

    Returns:
        The model, its modules lightened by `lean_modules`.

    Raises:
        AlignkitError: ``base`` cannot be found or read, lacks weights or some of them, or holds
            NaN or infinity.
    """
    if quantize is not None:
        need_bitsandbytes()
    location, options = _locate(base, "base")
    # Reading a local file takes seconds; a download keeps its bars.
    local = Path(base).expanduser().exists()
    with _one_line("base", base, _ADVICE), without_bars(local):
        config = AutoConfig.from_pretrained(location, trust_remote_code=False, **options)
        if random_init:
            model = _CausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
        else:
            _check_weights(base)
            if "gguf_file" in options:
                options["quantization_config"] = GgufConfig(dequantize=True)
            model, missing = read_weights(location, config, dtype, options)
            _check_complete(base, missing)
            if quantize is not None:
                hold(model)
            refuse_nonfinite_weights(
                model, f"base '{base}'", "download or save the model again, or load it in float32"
            )
    lean_modules(model)
    if quantize is not None:
        pack(model, quantize)
    model.eval()
    return model  # type: ignore[no-any-return]


def read_config(base: str) -> PretrainedConfig:
    """Read a model's config, without weights.

    Args:
        base: As in `load_model`.

    Raises:
        AlignkitError: There is no config, or it cannot be read.
    """
    location, options = _locate(base, "base")
    with _one_line("base", base, _ADVICE), without_bars(True):
        config: PretrainedConfig = AutoConfig.from_pretrained(
            location, trust_remote_code=False, **options
        )
    return config


def stored_dtype(base: str) -> torch.dtype:
    """Return the dtype that a base's weights are stored in, by its config.

    Returns:
        float32 where the config names none, or one that merged models are not written in.

    Raises:
        AlignkitError: The config cannot be found or read.
    """
    config = read_config(base)
    named = getattr(config.get_text_config(), "dtype", None) or config.dtype
    known = (torch.float32, torch.bfloat16, torch.float16)
    return named if named in known else torch.float32


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """Load a tokenizer that has an EOS and a padding token.

    Args:
        path: A Hub id, a local directory or a ``.gguf`` file.

    Returns:
        The tokenizer. Where it has no padding token, EOS takes that role, so the vocabulary
        never outgrows the model's embedding; padding must then be masked by length, not by id.

    Raises:
        AlignkitError: ``path`` cannot be found or read, holds no vocabulary, or has no EOS.
    """
    location, options = _locate(path, "tokenizer")
    if Path(location).suffix == ".json":
        location = str(Path(location).parent)
    advice = "pass a Hub id, a directory with a tokenizer.json or a .gguf file"
    with _one_line("tokenizer", path, advice):
        tokenizer = AutoTokenizer.from_pretrained(location, trust_remote_code=False, **options)
        # From a config alone transformers builds a tokenizer of special tokens and no words.
        if tokenizer.vocab_size == 0 or len(tokenizer) <= len(tokenizer.added_tokens_decoder):
            raise AlignkitError(f"tokenizer '{path}': holds no vocabulary; {advice}")
    if tokenizer.eos_token_id is None:
        raise AlignkitError(
            f"tokenizer '{path}': has no EOS token, so no response could end; "
            "set eos_token in its tokenizer_config.json"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
        log.info("tokenizer '%s' has no padding token: using EOS %r", path, tokenizer.eos_token)
    return tokenizer


def _locate(name: str, argument: str) -> tuple[str, dict[str, Any]]:
    """Return what ``from_pretrained`` takes for ``name``: a location and its keyword arguments."""
    path = Path(name).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        _need_gguf_packages(name, argument)
        return str(path.parent), {"gguf_file": path.name}
    if path.is_dir():
        held = (path / "tokenizer.json").exists() and argument == "tokenizer"
        adapter = (path / "adapter_config.json").exists() and not (path / "config.json").exists()
        if adapter and not held:
            raise AlignkitError(
                f"{argument} '{name}': is a LoRA adapter, not a model; pass it to init_from and "
                f"the model it was trained on as {argument}"
            )
        return str(path), {}
    if path.is_file():
        if path.suffix == ".json":
            return str(path), {}
        raise AlignkitError(f"{argument} '{name}': is not a model file; {_ADVICE}")
    if path.suffix in (".gguf", ".json") or not _HUB_ID.fullmatch(name):
        raise AlignkitError(f"{argument} '{name}': no such file or directory; {_ADVICE}")
    # Without this the Hub client retries for 23 s a file before it gives up.
    return name, {"local_files_only": not hub_reachable()}


def embedding_size(model: PreTrainedModel) -> int:
    """Return how many token ids a model has embeddings for, with or without adapters."""
    embedding: Any = model.get_input_embeddings()
    return int(getattr(embedding, "num_embeddings", None) or len(embedding.weight))


def hub_reachable() -> bool:
    """Ask the Hub once, briefly; any answer counts, an error page included."""
    if hub.HF_HUB_OFFLINE:
        return False
    try:
        request = urllib.request.Request(hub.ENDPOINT, method="HEAD")
        urllib.request.urlopen(request, timeout=_HUB_TIMEOUT_S).close()
    except urllib.error.HTTPError:
        return True
    except urllib.error.URLError as error:
        # A certificate that Python rejects may be fine for the Hub client, which has its own.
        return isinstance(error.reason, ssl.SSLError)
    except (OSError, HTTPException):
        return False
    return True


def _need_gguf_packages(name: str, argument: str) -> None:
    missing = [p for p in ("gguf", "accelerate") if importlib.util.find_spec(p) is None]
    if missing:
        raise AlignkitError(
            f"{argument} '{name}': reading GGUF needs {' and '.join(missing)}; "
            "run pip install gguf accelerate"
        )


def _check_weights(base: str) -> None:
    """Refuse a local ``base`` without safetensors before transformers looks for a pickle."""
    path = Path(base).expanduser()
    if path.suffix == ".gguf" or not path.exists():
        return
    directory = path if path.is_dir() else path.parent
    if path.is_dir() and any(directory.glob("*.safetensors")):
        return
    if path.is_dir() and any(file.suffix in (".bin", ".pt", ".pth") for file in path.iterdir()):
        raise AlignkitError(
            f"base '{base}': holds pickled weights only, which alignkit never opens; save the "
            "model again with save_pretrained, which writes safetensors"
        )
    raise AlignkitError(
        f"base '{base}': holds a config but no weights; pass a directory with .safetensors "
        "files, or random_init=true to start from random weights"
    )


def _check_complete(base: str, missing: list[str]) -> None:
    """Refuse the random values transformers gives to parameters that a checkpoint lacks."""
    if missing:
        raise AlignkitError(
            f"base '{base}': its weights lack {len(missing)} parameters, the first "
            f"'{missing[0]}'; download or save the model again"
        )


@contextmanager
def _one_line(argument: str, name: str, advice: str) -> Iterator[None]:
    """Turn what the loading libraries raise into one line that names the argument."""
    try:
        yield
    except AlignkitError:
        raise
    except _LOAD_ERRORS as error:
        if not Path(name).expanduser().exists() and not hub_reachable():
            raise AlignkitError(
                f"{argument} '{name}': no such local path, and the Hugging Face Hub cannot be "
                f"reached; pass {_LOCAL} as {argument}"
            ) from error
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".:; ")
        raise AlignkitError(f"{argument} '{name}': {reason}; {advice}") from error
