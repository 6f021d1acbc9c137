"""Models of known shapes with random weights, and which of their layers LoRA adapts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from alignkit.errors import AlignkitError

_NO_DROPOUT: dict[str, Any] = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
_IDS: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}

SHAPES: dict[str, PretrainedConfig] = {
    "gpt2-shape": GPT2Config(**_NO_DROPOUT, **_IDS),
    "smollm2-135m-shape": LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        **_IDS,
    ),
    "pythia-1.4b-shape": GPTNeoXConfig(
        vocab_size=50304,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=24,
        num_attention_heads=16,
        max_position_embeddings=2048,
        **_IDS,
    ),
    # Blocks as published (Qwen3-0.6B, Gemma 3 270M, Mistral 7B at a quarter of its width), fewer of
    # them, and one vocabulary, so that a CPU takes a step in seconds.
    "qwen3-shape": Qwen3Config(
        vocab_size=49152,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=8,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        **_IDS,
    ),
    "gemma3-shape": Gemma3TextConfig(
        vocab_size=49152,
        hidden_size=640,
        intermediate_size=2048,
        num_hidden_layers=18,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=256,
        sliding_window=512,
        max_position_embeddings=4096,
        **_IDS,
    ),
    "mistral-shape": MistralConfig(
        vocab_size=49152,
        hidden_size=1024,
        intermediate_size=3584,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=128,
        sliding_window=512,
        max_position_embeddings=4096,
        **_IDS,
    ),
    "tiny-gpt2-shape": GPT2Config(
        vocab_size=512, n_positions=512, n_embd=64, n_layer=2, n_head=4, **_NO_DROPOUT, **_IDS
    ),
    "tiny-llama-shape": LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        **_IDS,
    ),
}

# The attention's projections, the report's choice for GPT-2.
_APART = ("q_proj", "k_proj", "v_proj", "o_proj")
TARGETS = {
    "gpt2": ("attn.c_attn", "attn.c_proj"),
    "gpt_neox": ("query_key_value", "attention.dense"),
    **dict.fromkeys(("llama", "qwen3", "gemma3_text", "mistral"), _APART),
}


def targets_of(config: PretrainedConfig) -> tuple[str, ...]:
    """The layers to adapt in a model of this family."""
    if config.model_type not in TARGETS:
        known = ", ".join(TARGETS)
        raise AlignkitError(f"--model: no LoRA targets for {config.model_type}; use {known}")
    return TARGETS[config.model_type]


def write_random_model(name: str, directory: Path, seed: int, device: str = "cpu") -> None:
    """Save a shape's random weights, in bf16 so that bf16 and fp32 arms hold the same values.

    Args:
        name: One of `SHAPES`.
        directory: Where to.
        seed: Of the draw.
        device: Where to draw them; a GPU takes a second where a CPU takes a minute.
    """
    torch.manual_seed(seed)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(SHAPES[name], dtype=torch.bfloat16)
    model.to("cpu").save_pretrained(directory)
    # TRL asks every model for a tokenizer with a padding token; nothing is tokenized with it.
    tokenizer = Tokenizer(models.WordLevel({"<|endoftext|>": 0}, unk_token="<|endoftext|>"))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    ).save_pretrained(directory)
