"""An export is read back as it is, or it is not written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3MoeConfig

from alignkit.errors import AlignkitError
from alignkit.lora import LoRAConfig, inject_lora, load_adapter
from alignkit.models.export import export

Make = Callable[..., PreTrainedModel]
Shake = Callable[..., nn.Module]


@pytest.fixture
def moe() -> PreTrainedModel:
    """Two layers, the first of them dense."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, moe_intermediate_size=16,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        num_experts=4, num_experts_per_tok=2, mlp_only_layers=[0], max_position_embeddings=64,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval()


def test_what_peft_takes_for_experts_is_refused_and_travels_otherwise(
    moe: PreTrainedModel, shake: Shake, tmp_path: Path
) -> None:
    import copy

    plain, other = copy.deepcopy(moe), copy.deepcopy(moe)
    shake(inject_lora(moe, LoRAConfig(targets=("q_proj", "up_proj", "gate_proj", "down_proj"))))
    with pytest.raises(AlignkitError) as caught:
        export(moe, tmp_path / "peft", "peft")
    line = str(caught.value)
    assert "\n" not in line
    assert "down_proj, gate_proj, up_proj of qwen3_moe" in line
    assert "model.layers.0.mlp." in line and "--to merged" in line
    assert not (tmp_path / "peft").exists()
    ids = torch.arange(1, 20)[None]
    with torch.no_grad():
        want = moe(ids).logits
        export(moe, tmp_path / "file", "safetensors")
        ours = load_adapter(plain, tmp_path / "file" / "adapter.safetensors")
        assert torch.equal(ours(ids).logits, want)
        export(moe, tmp_path / "merged", "merged")
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
        torch.testing.assert_close(merged(ids).logits, want, rtol=1e-4, atol=1e-4)
    shake(inject_lora(other, LoRAConfig(targets=("q_proj", "v_proj"))))
    export(other, tmp_path / "attention", "peft")  # attention alone is read as it is


@pytest.mark.parametrize("to", ["peft", "safetensors", "merged"])
def test_a_number_that_is_none_is_named_and_nothing_written(
    trained: PreTrainedModel, tmp_path: Path, to: Any
) -> None:
    with torch.no_grad():
        trained.transformer.h[1].attn.c_attn.adapters["default"].lora_B[0, 0] = float("inf")
    with pytest.raises(AlignkitError, match=r"h\.1\.attn\.c_attn.* holds NaN or infinity"):
        export(trained, tmp_path / "out", to)
    assert not (tmp_path / "out").exists()
    assert list(tmp_path.iterdir()) == []


def test_a_merged_weight_beyond_half_precision_is_named(tiny_model: Make, tmp_path: Path) -> None:
    model = inject_lora(tiny_model("gpt2").half(), LoRAConfig(r=2))
    with torch.no_grad():
        adapter = model.transformer.h[0].attn.c_attn.adapters["default"]
        adapter.lora_A.fill_(300.0)
        adapter.lora_B.fill_(300.0)
    with pytest.raises(AlignkitError, match=r"once merged: .*c_attn\.weight holds .* in float16"):
        export(model, tmp_path / "out", "merged")


def test_a_merged_model_that_loses_a_parameter_is_not_written(
    tiny_model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import load_file, save_file

    model = tiny_model("llama")
    save = type(model).save_pretrained

    def lossy(self: PreTrainedModel, directory: str) -> None:
        save(self, directory)
        file = Path(directory) / "model.safetensors"
        tensors = load_file(file)
        tensors.pop("model.layers.1.mlp.up_proj.weight")
        save_file(tensors, file, metadata={"format": "pt"})

    monkeypatch.setattr(type(model), "save_pretrained", lossy)
    with pytest.raises(AlignkitError, match=r"without 1 of its parameters.*layers\.1\.mlp\.up"):
        export(model, tmp_path / "out", "merged")
    assert list(tmp_path.iterdir()) == []


def test_a_tied_model_with_a_foreign_adapter_keeps_its_head(shake: Shake, tmp_path: Path) -> None:
    """Reading it as untied wrote a model without a head, which transformers then drew at random."""
    from transformers import LlamaConfig

    def tied() -> PreTrainedModel:
        torch.manual_seed(0)
        shape = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48}
        config = LlamaConfig(
            **shape, num_hidden_layers=2, num_attention_heads=4, tie_word_embeddings=True
        )
        return AutoModelForCausalLM.from_config(config).eval()

    ids = torch.arange(1, 20)[None]
    for targets in ("q_proj", "lm_head", "embed_tokens"):
        model = shake(inject_lora(tied(), LoRAConfig(targets=targets, untie=True)))
        export(model, tmp_path / targets, "peft")
        again = load_adapter(tied(), tmp_path / targets, untie=True)
        assert again.config.tie_word_embeddings == (targets == "q_proj")
        with torch.no_grad():
            torch.testing.assert_close(again(ids).logits, model(ids).logits)
            export(again, tmp_path / f"{targets}-merged", "merged")
            merged = AutoModelForCausalLM.from_pretrained(tmp_path / f"{targets}-merged").eval()
            torch.testing.assert_close(merged(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)


def test_names_that_mean_more_to_peft_are_written_as_paths(
    tiny_model: Make, tmp_path: Path
) -> None:
    """PEFT knows layers only below a list of blocks that has a parent, and no expressions."""
    model = tiny_model("llama")
    inject_lora(model, LoRAConfig(targets=r".*\.0\..*(q|v)_proj", alpha_pattern={"q_proj": 2}))
    export(model, tmp_path, "peft")
    raw = json.loads((tmp_path / "adapter_config.json").read_text())
    assert raw["target_modules"] == [
        f"model.layers.0.self_attn.{name}" for name in ("q_proj", "v_proj")
    ]


@pytest.mark.parametrize("field", ["a_variant_of_tomorrow", "lora_ga2_config", "use_qalora"])
def test_a_setting_that_is_not_known_is_refused(saved: Path, tiny_model: Make, field: str) -> None:
    path = saved / "adapter_config.json"
    raw = json.loads(path.read_text())
    path.write_text(json.dumps({**raw, field: None}))
    load_adapter(tiny_model("gpt2"), saved)  # unset, it is no matter
    path.write_text(json.dumps({**raw, field: {"on": True}}))
    with pytest.raises(AlignkitError, match=f"{field} is set, which alignkit cannot express"):
        load_adapter(tiny_model("gpt2"), saved)
