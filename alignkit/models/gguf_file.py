"""Write a plain model and its tokenizer as one GGUF file, which llama.cpp and Ollama read.

Only what is known to come back the same is written: Llama, Mistral, Qwen2 and Qwen3 with plain
rotary positions, and byte-level BPE tokenizers whose way to split text llama.cpp knows. Anything
else is refused with the command of llama.cpp's own converter.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from alignkit.errors import AlignkitError

GGUF_FILE = "model.gguf"

_ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""llama.cpp's name for each model type. Mistral is its Llama."""
_INTERLEAVED = ("llama",)
"""Architectures that rotate neighbouring pairs, where transformers rotates halves."""
_OUTSIDE = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
_INSIDE = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_BLOCK = re.compile(r"model\.layers\.(\d+)\.(.+)")

_BYTES: dict[str, Any] = {"type": "ByteLevel", "add_prefix_space": False}
_GPT2 = {**_BYTES, "use_regex": True}
_AFTER_REGEX = {**_BYTES, "use_regex": False}
_LLAMA3_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _split(regex: str) -> dict[str, Any]:
    by = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [by, _AFTER_REGEX]}


_DIGITS = {"type": "Digits", "individual_digits": True}
_PRE_TOKENIZERS: Mapping[str, dict[str, Any]] = {
    "gpt-2": _GPT2,
    "smollm": {"type": "Sequence", "pretokenizers": [_DIGITS, _GPT2]},
    "llama-bpe": _split(_LLAMA3_REGEX),
    "qwen2": _split(_LLAMA3_REGEX.replace("{1,3}", "")),
}
"""llama.cpp's names for ways to split text before the merges, and the tokenizer.json of each."""

_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5


def need_gguf() -> None:
    """Refuse to write GGUF without the package for it."""
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise AlignkitError(
            f"export: --to gguf needs {' and '.join(missing)}; run pip install gguf accelerate"
        )


def write_gguf(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: Path, name: str
) -> None:
    """Write a model without wrappers, in the dtype of its weights; vectors are kept in fp32.

    Args:
        model: The model, its adapters merged.
        tokenizer: Its tokenizer, with the chat template that readers shall use.
        path: The file.
        name: What readers show as the model's name.

    Raises:
        AlignkitError: The model or its tokenizer is of a kind that this does not write.
    """
    from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType, quants

    architecture = _architecture(model.config)
    words = _vocabulary(model.config, tokenizer)
    kinds: dict[torch.dtype, tuple[Any, Any]] = {
        torch.float32: (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
        torch.float16: (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
        torch.bfloat16: (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    }
    kind, file_type = kinds[model.dtype]
    writer = GGUFWriter(path, architecture)
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(int(file_type))
    _write_settings(writer, model.config)
    _write_vocabulary(writer, model, tokenizer, words)
    for tensor_name, tensor in _tensors(model, architecture):
        values = tensor.detach().float().cpu().numpy()
        stored = kind if values.ndim > 1 else GGMLQuantizationType.F32
        writer.add_tensor(tensor_name, quants.quantize(values, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _architecture(config: PretrainedConfig) -> str:
    architecture = _ARCHITECTURES.get(config.model_type)
    if architecture is None:
        known = ", ".join(_ARCHITECTURES)
        raise _unwritten(f"{config.model_type} is not among {known}")
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = getattr(config, "layer_types", None) or ["full_attention"]
    expected = {
        "rope_type": (rope.get("rope_type", "default"), "default"),
        "partial_rotary_factor": (rope.get("partial_rotary_factor", 1.0), 1.0),
        "hidden_act": (config.hidden_act, "silu"),
        "layer_types": (sorted({*kinds}), ["full_attention"]),
    }
    # transformers, which reads the file back, takes these values for granted.
    taken: dict[str, dict[str, Any]] = {
        "llama": {"attention_bias": False, "mlp_bias": False},
        "mistral": {"sliding_window": None},
        "qwen3": {"attention_bias": False, "head_dim": 128},
    }
    for setting, wanted in taken.get(config.model_type, {}).items():
        expected[setting] = (getattr(config, setting), wanted)
    for setting, (given, wanted) in expected.items():
        if given != wanted:
            raise _unwritten(f"its {setting} is {given!r}")
    return architecture


def _write_settings(writer: Any, config: PretrainedConfig) -> None:
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    writer.add_vocab_size(config.vocab_size)


def _tensors(model: PreTrainedModel, architecture: str) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights by llama.cpp's names; a tied head is the embedding and is left out."""
    config = model.config
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for name, parameter in model.named_parameters():
        module, _, kind = name.rpartition(".")
        block = _BLOCK.fullmatch(module)
        theirs = _INSIDE.get(block[2]) if block else _OUTSIDE.get(module)
        if theirs is None:
            raise _unwritten(f"its parameter {name} has no name there")
        tensor = parameter.detach()
        if architecture in _INTERLEAVED and theirs in heads:
            tensor = _interleaved(tensor, heads[theirs])
        yield (f"blk.{block[1]}.{theirs}.{kind}" if block else f"{theirs}.{kind}"), tensor


def _interleaved(weight: Tensor, heads: int) -> Tensor:
    """Return each head's outputs with the two that are rotated together as neighbours."""
    split = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return split.transpose(1, 2).reshape(weight.shape)


class _Vocabulary(NamedTuple):
    """Hold what GGUF keeps of a byte-level BPE tokenizer; ``pre`` names how text is split."""

    tokens: list[str]
    types: list[int]
    merges: list[str]
    pre: str


def _vocabulary(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> _Vocabulary:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise _unwritten(f"its tokenizer, {type(tokenizer).__name__}, has no tokenizer.json")
    content = json.loads(backend.to_str())
    model = content["model"]
    if model["type"] != "BPE" or model.get("byte_fallback") or content["normalizer"] is not None:
        raise _unwritten("its tokenizer is not plain byte-level BPE")
    pre = next(
        (name for name, known in _PRE_TOKENIZERS.items() if _same(content["pre_tokenizer"], known)),
        None,
    )
    if pre is None:
        raise _unwritten("its tokenizer splits text in a way that is not among llama.cpp's")
    size = config.vocab_size
    tokens = [f"[PAD{index}]" for index in range(size)]
    types = [_UNUSED] * size
    for token, index in model["vocab"].items():
        tokens[index], types[index] = token, _NORMAL
    for added in content["added_tokens"]:
        tokens[added["id"]] = added["content"]
        types[added["id"]] = _CONTROL if added["special"] else _USER_DEFINED
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    return _Vocabulary(tokens, types, merges, pre)


def _same(given: Any, known: Mapping[str, Any]) -> bool:
    """Compare two pre-tokenizers by what decides where text is split."""
    if not isinstance(given, dict) or given.get("type") != known["type"]:
        return False
    if known["type"] == "Sequence":
        theirs, ours = given["pretokenizers"], known["pretokenizers"]
        return len(theirs) == len(ours) and all(map(_same, theirs, ours))
    defaults = {"use_regex": True} if known["type"] == "ByteLevel" else {}
    return all({**defaults, **given}.get(key) == value for key, value in known.items())


def _write_vocabulary(
    writer: Any, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, words: _Vocabulary
) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(words.pre)
    writer.add_token_list(words.tokens)
    writer.add_token_types(words.types)
    writer.add_token_merges(words.merges)
    for kind in ("bos", "eos", "pad", "unk"):
        index = getattr(tokenizer, f"{kind}_token_id")
        if index is not None:
            getattr(writer, f"add_{kind}_token_id")(index)
    ends = np.atleast_1d(getattr(model.generation_config, "eos_token_id", None) or [])
    others = [int(end) for end in ends if end != tokenizer.eos_token_id]
    if others:
        writer.add_eot_token_id(others[0])
    first = tokenizer("a")["input_ids"][:1]
    begins = tokenizer.bos_token_id is not None and first == [tokenizer.bos_token_id]
    writer.add_add_bos_token(begins)
    writer.add_add_space_prefix(False)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _unwritten(reason: str) -> AlignkitError:
    return AlignkitError(
        f"export: --to gguf does not write this model ({reason}); export --to merged --output DIR "
        "and run llama.cpp's converter: python convert_hf_to_gguf.py DIR --outfile model.gguf"
    )
