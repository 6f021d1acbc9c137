"""A base's name: whatever changes what its weights compute changes it, and nothing else does."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedModel

from alignkit.lora import LoRAConfig, inject_lora
from alignkit.models import load_model
from alignkit.models.load import base_fingerprint
from alignkit.models.settings import function_settings
from tests.architectures import SHAPE, built, tiny

Make = Callable[..., PreTrainedModel]

ARCHITECTURES = (
    "llama", "gpt2", "gpt_neox", "mistral", "gemma2", "gemma3_text", "phi3", "granite", "olmo2",
    "cohere", "qwen3", "phimoe", "mixtral", "gpt_oss", "falcon", "bloom", "opt", "stablelm",
)  # fmt: skip
ROPES: tuple[dict[str, Any], ...] = (
    {"rope_type": "default", "rope_theta": 500.0},
    {"rope_type": "linear", "factor": 4.0},
    {"rope_type": "linear", "factor": 3.0},
    {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 16},
    {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 16},
    {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 16, "beta_fast": 9.0},
    {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    {"partial_rotary_factor": 0.5},
)  # fmt: skip
ACTIVATIONS = ("relu", "silu", "gelu", "gelu_pytorch_tanh", "tanh")
IDS = torch.randint(0, 64, (1, 40), generator=torch.Generator().manual_seed(0))


def rebuilt(config: PretrainedConfig, weights: dict[str, Tensor]) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_config(config).eval()
    model.load_state_dict(weights)
    return model


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    return model(IDS).logits


def other_values(value: Any) -> Iterator[Any]:
    """Values to try in a setting's place."""
    if isinstance(value, bool):
        yield not value
    elif isinstance(value, int):
        yield from (value + 1, value * 2, max(value // 2, 1))
    elif isinstance(value, float):
        yield from (value * 1.5 + 0.1, value / 2)
    elif value is None:
        yield from (True, 4, 0.3)
    elif isinstance(value, str):
        yield from ACTIVATIONS
    elif isinstance(value, list) and value and isinstance(value[0], str):
        yield from (
            value[::-1],
            ["full_attention"] * len(value),
            ["sliding_attention"] * len(value),
        )
    elif isinstance(value, list):
        yield [item * 2 for item in value]
    elif isinstance(value, dict) and "rope_theta" in value:
        yield from ({**value, **rope} for rope in ROPES)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
@pytest.mark.filterwarnings("ignore")
def test_no_setting_that_changes_the_logits_keeps_the_name(model_type: str) -> None:
    """Every setting of the config changed, one at a time, over the very same weights."""
    config = tiny(model_type)
    model = built(config)
    weights, want, name = model.state_dict(), logits(model), base_fingerprint(model)
    values = {k: v for k, v in config.to_dict().items() if k not in ("model_type", "dtype")}
    changed = []
    for key, value in {**values, "is_causal": True}.items():
        for other in other_values(value):
            try:
                changed_model = rebuilt(
                    type(config)(**{**copy.deepcopy(values), key: other}), weights
                )
                got = logits(changed_model)
            except Exception:  # no such model, or one of another shape
                continue
            if got.shape != want.shape or (got - want).abs().max() > 1e-4:
                changed.append(key)
                assert base_fingerprint(changed_model) != name, f"{key}: {value} → {other}"
    assert len(changed) >= 5, changed  # the test does change functions


def test_the_settings_of_the_issue_all_count() -> None:
    """Each of them moves the score of a token by tenths of a nat and more."""
    cases = {
        "llama": [("rms_norm_eps", 0.1), ("hidden_act", "gelu"), ("rope_parameters", ROPES[6])],
        "gemma2": [
            ("final_logit_softcapping", 1.0),
            ("attn_logit_softcapping", 0.5),
            ("sliding_window", 4),
            ("layer_types", ["sliding_attention"] * 2),
        ],
        "granite": [("logits_scaling", 4.0), ("residual_multiplier", 0.5)],
        "cohere": [("logit_scale", 2.0)],
        "mistral": [("sliding_window", None)],
        "opt": [("do_layer_norm_before", False)],
    }
    for model_type, changes in cases.items():
        config = tiny(model_type)
        names = {json.dumps(function_settings(config), sort_keys=True)}
        for key, value in changes:
            other = type(config)(**{**config.to_dict(), key: value})
            names.add(json.dumps(function_settings(other), sort_keys=True))
        assert len(names) == 1 + len(changes), model_type


def test_bookkeeping_does_not_count(tiny_model: Make) -> None:
    model = tiny_model("llama")
    name = base_fingerprint(model)
    values = {
        "architectures": ["Other"], "use_cache": False, "pad_token_id": 5, "eos_token_id": [1, 2],
        "attention_dropout": 0.3, "id2label": {0: "a"}, "initializer_range": 1.0,
        "transformers.js_config": {"dtype": {}}, "quantization_config": {"quant_method": "gguf"},
        "_name_or_path": "elsewhere", "tie_word_embeddings": True, "return_dict": False,
    }  # fmt: skip
    for key, value in values.items():
        setattr(model.config, key, value)
        assert base_fingerprint(model) == name, key
    model.set_attn_implementation("eager")
    assert base_fingerprint(model) == name


def test_a_default_that_is_spelled_out_is_the_same_setting() -> None:
    """Also what a config of another version leaves out, and 10000 for 10000.0."""
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    plain = LlamaConfig(rms_norm_eps=1e-6, rope_parameters=rope)
    spelled = LlamaConfig(
        mlp_bias=False, rms_norm_eps=torch.tensor(1e-6).item(), hidden_act="silu",
        rope_parameters={"rope_type": "default", "rope_theta": 10000, "factor": None},
    )  # fmt: skip
    assert function_settings(plain) == function_settings(spelled)
    assert function_settings(plain) != function_settings(LlamaConfig(rms_norm_eps=1.00001e-6))


def test_none_is_not_the_default() -> None:
    mistral = type(tiny("mistral"))
    assert function_settings(mistral()) != function_settings(mistral(sliding_window=None))


def test_one_base_has_one_name_however_it_is_loaded(
    tmp_path: Path, tiny_model: Make, family: str
) -> None:
    model = tiny_model(family)
    names = {base_fingerprint(model)}
    for dtype in (torch.float32, torch.bfloat16):
        tiny_model(family).to(dtype).save_pretrained(tmp_path / str(dtype))
        names |= {
            base_fingerprint(load_model(str(tmp_path / str(dtype)), dtype=other))
            for other in (torch.float32, torch.bfloat16)
        }
    model.config._name_or_path = "another"
    model.train()
    names.add(base_fingerprint(model))
    assert len(names) == 1


@pytest.mark.parametrize(
    "options",
    [
        {"init": "pissa"},
        {"init": "olora", "targets": ("q_proj",)},
        {"use_dora": True},
        {"bias": "all", "modules_to_save": ("norm", "mlp")},
        {"targets": ("lm_head", "q_proj"), "untie": True},
        {"targets": "embed_tokens", "untie": True},
    ],
)
@pytest.mark.parametrize("tied", [False, True])
def test_no_adapter_changes_the_bases_name(options: dict[str, Any], tied: bool) -> None:
    """Nor what it subtracts, trains as a whole, or unties."""
    torch.manual_seed(0)
    config = {"attention_bias": True, "tie_word_embeddings": tied}
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(**{k: v for k, v in SHAPE.items() if hasattr(LlamaConfig(), k)}, **config)
    )
    name = base_fingerprint(model)
    inject_lora(model, LoRAConfig(**{"targets": ("q_proj", "v_proj"), **options}))
    assert base_fingerprint(model) == name


def test_swapped_rows_are_seen(tmp_path: Path, tiny_model: Make) -> None:
    """As of a vocabulary put into another order: the same numbers in other places."""
    model = tiny_model("llama")
    name = base_fingerprint(model)
    weight = model.model.embed_tokens.weight
    with torch.no_grad():
        weight[[5, 77]] = weight[[77, 5]].clone()
    assert base_fingerprint(model) != name


def test_buffers_that_are_kept_count_and_others_do_not(tiny_model: Make) -> None:
    model = tiny_model("llama")
    name = base_fingerprint(model)
    model.model.register_buffer("cache", torch.ones(3), persistent=False)
    assert base_fingerprint(model) == name
    model.model.register_buffer("codes", torch.tensor([1, 200], dtype=torch.int32))
    with_codes = base_fingerprint(model)
    model.model.codes[1] += 1  # bfloat16 holds no 201
    assert len({name, with_codes, base_fingerprint(model)}) == 3


def test_a_shared_weight_is_not_two_equal_ones(tiny_model: Make) -> None:
    model = tiny_model("llama")
    model.lm_head.weight = nn.Parameter(model.model.embed_tokens.weight.detach().clone())
    apart = base_fingerprint(model)
    model.lm_head.weight = model.model.embed_tokens.weight
    assert base_fingerprint(model) != apart


def test_a_tensor_file_edited_in_place_is_another_base(tmp_path: Path, tiny_model: Make) -> None:
    tiny_model("gpt2").save_pretrained(tmp_path)
    name = base_fingerprint(load_model(str(tmp_path)))
    tensors = load_file(tmp_path / "model.safetensors")
    key = "transformer.h.1.mlp.c_fc.bias"
    tensors[key] = tensors[key].flip(0)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert base_fingerprint(load_model(str(tmp_path))) != name
