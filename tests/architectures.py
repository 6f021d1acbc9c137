"""Tiny configs of many architectures."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

SHAPE: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "n_embd": 32, "intermediate_size": 48, "ffn_dim": 48,
    "dff": 48, "num_hidden_layers": 2, "n_layer": 2, "num_attention_heads": 4, "n_head": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "n_positions": 64,
    "sliding_window": 8, "query_pre_attn_scalar": 8, "word_embed_proj_dim": 32,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4,
    "num_experts_per_tok": 2, "moe_k": 2, "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16, "n_shared_experts": 1, "num_shared_experts": 1,
    "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
    "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
# Attention through a latent: the head's width is put together from other fields.
LATENT = {
    "kv_lora_rank": 8, "q_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
    "v_head_dim": 8, "num_key_value_heads": 4,
}  # fmt: skip


def tiny(model_type: str) -> PretrainedConfig:
    """A config of two small layers."""
    kind = CONFIG_MAPPING[model_type]
    known = {field.name for field in dataclasses.fields(kind)}
    shape = dict(SHAPE)
    if "kv_lora_rank" in known:
        shape |= LATENT
        del shape["head_dim"]
    return kind(**{key: value for key, value in shape.items() if key in known})


def built(config: PretrainedConfig, seed: int = 0) -> PreTrainedModel:
    """A model far from its initialisation, in eval mode."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model
