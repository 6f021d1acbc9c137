"""Tiny configurations of every causal language model of the installed transformers."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCAB = 128
WINDOW = 6
"""Of every window, chunk and sparse choice: shorter than most sequences of a test."""
ORIGINAL = 16
"""Positions before a rotary embedding is stretched."""

# What a tiny model takes for each size, where its configuration has one of that name.
_SIZES: list[tuple[int, str]] = [
    (VOCAB, "vocab_size vocab_size_per_layer_input decoder_vocab_size unpadded_vocab_size"),
    (
        32,
        "hidden_size n_embd d_model emb_dim attention_hidden_size embedding_size lru_width "
        "word_embed_proj_dim embedding_dim input_embedding_size output_embedding_size",
    ),
    (
        48,
        "intermediate_size ffn_dim ffn_hidden_size decoder_ffn_dim encoder_ffn_dim dff dim_ff "
        "d_inner intermediate_size_mlp dense_intermediate_size shared_intermediate_size "
        "feed_forward_size",
    ),
    (
        16,
        "moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size "
        "moe_shared_expert_intermediate_size shared_experts_intermediate_size "
        "kv_lora_rank q_lora_rank",
    ),
    (
        4,
        "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers "
        "num_decoder_layers num_encoder_layers num_blocks num_layers_per_stack "
        "num_attention_heads n_head n_heads num_heads attention_heads decoder_attention_heads "
        "encoder_attention_heads num_encoder_attention_heads num_decoder_attention_heads "
        "swa_num_attention_heads linear_num_key_heads linear_num_value_heads linear_num_heads "
        "num_experts num_local_experts n_routed_experts moe_num_experts "
        "qk_rope_head_dim rotary_dim time_step_rank mamba_dt_rank chunk_size mamba_chunk_size "
        "index_topk",
    ),
    (
        8,
        "head_dim kv_channels attention_head_dim dim_head d_head swa_head_dim attention_head_size "
        "qk_nope_head_dim v_head_dim linear_key_head_dim linear_value_head_dim linear_head_dim "
        "mamba_head_dim mamba_d_head mamba_headdim mamba_n_heads mamba_num_heads n_mamba_heads "
        "mamba_d_state state_size ssm_state_size index_head_dim",
    ),
    (2, "num_experts_per_tok moe_topk moe_k num_experts_per_token index_n_heads eos_token_id"),
    (1, "n_group topk_group num_expert_group n_groups mamba_ngroups mamba_n_groups bos_token_id"),
    (0, "pad_token_id"),
    (
        WINDOW,
        "sliding_window sliding_window_size attention_window_size window_size "
        "keep_window_size attention_chunk_size local_attention",
    ),
    (
        64,
        "max_position_embeddings n_positions n_ctx max_seq_len model_max_length context_length "
        "max_target_positions",
    ),
    (ORIGINAL, "original_max_position_embeddings"),
]
SIZES = {name: size for size, names in _SIZES for name in names.split()}
KEY_HEADS = (
    "num_key_value_heads",
    "swa_num_key_value_heads",
    "num_kv_heads",
    "num_global_key_value_heads",
)

ROPE = {"rope_type": "default", "rope_theta": 10000.0}
STRETCHED = {"rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": ORIGINAL}
LONGROPE = {
    **STRETCHED,
    "rope_type": "longrope",
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.0, 2.0, 4.0, 8.0],
}
SLIDING = {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": WINDOW}

# What a few configurations need beside small sizes.
OVERRIDES: dict[str, dict[str, Any]] = {
    "bert": {"is_decoder": True},
    "cohere_compass_text": {
        **SLIDING,
        "rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE},
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 48, "moe_num_experts": 4},
    },
    "deepseek_v2": {"n_group": 2, "num_experts_per_tok": 2, "topk_method": "greedy"},
    "dots1": {**SLIDING, "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note_text": {"per_layer_config": None, "head_dim": 12},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8},
    "gemma3": {
        "vision_config": {
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        },
        "mm_tokens_per_image": 4,
    },
    "gemma3n_text": {
        **SLIDING,
        "num_kv_shared_layers": 2,
        "intermediate_size": [48] * 4,
        "activation_sparsity_pattern": [0.0] * 4,
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 4,
    },
    "gemma4_text": {"hidden_size_per_layer_input": 8},
    "gpt_neo": {
        "attention_types": [[["global", "local"], 2]],
        "attention_layers": ["global", "local"] * 2,
    },
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8, "num_experts": 4, "moe_topk": 2},
    "laguna": SLIDING,
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "longcat_flash": {"zero_expert_num": 2, "num_layers": 2},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1},
    "mellum": SLIDING,
    "minimax_m3_vl_text": {"index_block_size": 4, "index_topk_blocks": 1},
    "ministral": {**SLIDING, "head_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
    "phimoe": {"router_jitter_noise": 0.0, "input_jitter_noise": 0.0},
    "qwen4_exp_text": {
        "layer_types": ["linear_attention", "indexed_attention"] * 2,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 4,
        "indexer_compress_ratio": 2,
        "hc_lowrank": 4,
        "ple_embed_dim": 8,
        "ngram_vocab_size_base": 64,
        "make_ngram_vocab_size_divisible_by": 8,
        "split_ngram_parts": 2,
    },
    "reformer": {
        "is_decoder": True,
        "attn_layers": ["local", "lsh"] * 2,
        "axial_pos_shape": [8, 8],
        "axial_pos_embds_dim": [8, 24],
        "local_attn_chunk_length": 8,
        "lsh_attn_chunk_length": 8,
        "num_buckets": 4,
    },
    "roberta": {"is_decoder": True},
    "xmod": {"is_decoder": True, "default_language": "en_XX", "languages": ["en_XX"]},
    "zamba": {
        "num_hidden_layers": 6,
        "layers_block_type": ["linear_attention", "hybrid"] * 3,
        "n_mamba_heads": 2,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "use_mamba_kernels": False,
    },
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "layer_types": ["linear_attention", "hybrid"] * 2,
        "hybrid_layer_ids": [1, 3],
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "adapter_rank": 4,
        "use_mamba_kernels": False,
    },
    "zaya": {
        "num_experts_per_tok": 1,
        "layer_types": ["hybrid", "hybrid_sliding"] * 2,
        "sliding_window": WINDOW,
        "router_hidden_size": 8,
    },
}
# What only some configurations of a type turn on.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert-encoder": ("bert", {"is_decoder": False}),
    "cohere2+window": ("cohere2", SLIDING),
    "deepseek_v3+values": ("deepseek_v3", {"v_head_dim": 16}),
    "exaone4+window": ("exaone4", {**SLIDING, "sliding_window_pattern": 2}),
    "falcon+alibi": ("falcon", {"alibi": True}),
    "gemma3+bidirectional": ("gemma3_text", {"use_bidirectional_attention": True}),
    # Soft-capped attention below a plain head.
    "gemma2+softcap": ("gemma2", {"final_logit_softcapping": None, "attn_logit_softcapping": 5.0}),
    "gpt2+scale": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    "gpt_bigcode+heads": ("gpt_bigcode", {"multi_query": False}),
    "granite+scaled": ("granite", {"logits_scaling": 4.0, "attention_multiplier": 0.5}),
    "llama+dynamic": ("llama", {"rope_parameters": {**STRETCHED, "rope_type": "dynamic"}}),
    "llama+llama3": (
        "llama",
        {
            "rope_parameters": {
                **STRETCHED,
                "rope_type": "llama3",
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
            }
        },
    ),
    "llama+longrope": ("llama", {"rope_parameters": LONGROPE}),
    "llama+yarn": ("llama", {"rope_parameters": {**STRETCHED, "rope_type": "yarn"}}),
    "llama4+chunks": (
        "llama4_text",
        {
            "layer_types": ["chunked_attention", "full_attention"] * 2,
            "no_rope_layers": [1, 0, 1, 0],
            "floor_scale": 4,
        },
    ),
    "minicpm3+values": ("minicpm3", {"v_head_dim": 6}),
    "ministral3+scale": (
        "ministral3",
        {"rope_parameters": {**STRETCHED, "rope_type": "yarn", "llama_4_scaling_beta": 0.5}},
    ),
    "mistral-window": ("mistral", {"sliding_window": None}),
    "mistral+wide": ("mistral", {"sliding_window": 40}),
    "mixtral+window": ("mixtral", {"sliding_window": WINDOW}),
    "olmo3+window": ("olmo3", SLIDING),
    "phi3+longrope": ("phi3", {"rope_parameters": LONGROPE}),
    "phi3+window": ("phi3", {"sliding_window": WINDOW}),
    "phimoe+window": ("phimoe", {"sliding_window": WINDOW}),
    "qwen2+window": ("qwen2", {**SLIDING, "use_sliding_window": True}),
    "qwen2_moe+window": ("qwen2_moe", {**SLIDING, "use_sliding_window": True}),
    "qwen3+window": ("qwen3", {**SLIDING, "use_sliding_window": True}),
    "qwen3_moe+window": ("qwen3_moe", {"sliding_window": WINDOW, "use_sliding_window": True}),
    "smollm3+window": ("smollm3", {**SLIDING, "use_sliding_window": True}),
    "stablelm+parallel": ("stablelm", {"qk_layernorm": True, "use_parallel_residual": True}),
    "starcoder2+window": ("starcoder2", {"sliding_window": WINDOW}),
}
# Types whose tiny configuration needs more than sizes (towers of other modalities), or a package.
UNBUILT = {
    "blt",
    "dots3_note",
    "gemma3n",
    "gemma4_assistant",
    "gemma4_unified_assistant",
    "git",
    "got_ocr2",
    "moss_transcribe_diarize",
    "musicgen",
    "musicgen_melody",
    "phi4_multimodal",
    "qwen4_exp",
    "roc_bert",
}
KINDS = [k for k in (*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *VARIANTS) if k not in UNBUILT]


def tiny_config(kind: str, **changes: Any) -> PretrainedConfig:
    """Return a small configuration of a type of transformers, or of one of `VARIANTS`."""
    kind, variant = VARIANTS.get(kind, (kind, {}))
    cls = CONFIG_MAPPING[kind]
    values = cls().to_dict()
    small = _shrunk(values)
    for name in ("text_config", "decoder_config"):
        if isinstance(values.get(name), dict):
            small[name] = _shrunk(values[name])
            small[name]["model_type"] = values[name]["model_type"]
    return cls(**copy.deepcopy({**small, **OVERRIDES.get(kind, {}), **variant, **changes}))


def tiny_family(kind: str, spread: float = 0.15, **changes: Any) -> PreTrainedModel:
    """Build a small random model in eval mode.

    Args:
        kind: A type of transformers, or one of `VARIANTS`.
        spread: Of what is added to every matrix, so that attention is far from uniform.
        **changes: To the configuration.
    """
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(kind, **changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (spread if parameter.ndim > 1 else 0.05))
    return model.eval()


def _shrunk(values: dict[str, Any]) -> dict[str, Any]:
    small: dict[str, Any] = {}
    heads = next((values[k] for k in ("num_attention_heads", "n_heads") if values.get(k)), None)
    for key, value in values.items():
        if value is None:
            continue
        if key in KEY_HEADS:
            every = value == heads or "kv_lora_rank" in values
            small[key] = 4 if every else min(value, 2)
        elif key in SIZES and not isinstance(value, list):
            small[key] = SIZES[key]
        elif key in ("layer_types", "mlp_layer_types") and value:
            kinds = list(dict.fromkeys(value))
            small[key] = [kinds[i % len(kinds)] for i in range(4)]
    if values.get("qk_rope_head_dim") and values.get("head_dim") == values["qk_rope_head_dim"]:
        small["head_dim"] = small["qk_rope_head_dim"]
    return small
