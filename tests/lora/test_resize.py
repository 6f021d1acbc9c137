"""Embeddings with rows for further token ids: made, trained, and read from PEFT's adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from alignkit.errors import AlignkitError
from alignkit.lora import LoRAConfig, inject_lora, load_adapter, merge_lora, save_adapter
from alignkit.lora.resize import resize_embeddings, rows_before
from alignkit.models.fingerprint import base_identity

BOTH = ("embed_tokens", "lm_head")
IDS = torch.tensor([[3, 60, 66, 69, 5, 64]])


def llama(tied: bool = True) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=tied,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    out: torch.Tensor = model(IDS).logits
    return out


@pytest.mark.parametrize("tied", [True, False])
def test_new_rows_are_the_mean_and_the_model_keeps_its_name(tied: bool) -> None:
    model, before = llama(tied), llama(tied)
    named = base_identity(model)
    resize_embeddings(model, 70)
    assert rows_before(model) == 64 and model.config.vocab_size == 70
    for weight in (model.model.embed_tokens.weight, model.lm_head.weight):
        assert len(weight) == 70
        torch.testing.assert_close(weight[64:], weight[:64].mean(0).expand(6, -1))
    assert base_identity(model) == named
    ids = IDS % 64
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits[..., :64], before(ids).logits)
    resize_embeddings(model, 50)
    assert model.config.vocab_size == 70


def test_a_model_with_adapters_is_refused() -> None:
    model = inject_lora(llama())
    with pytest.raises(AlignkitError, match="has adapters; resize the base"):
        resize_embeddings(model, 70)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj"], "modules_to_save": list(BOTH)},
        {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"],
         "ensure_weight_tying": True},
        {"target_modules": ["q_proj", *BOTH]},
    ],
)  # fmt: skip
@pytest.mark.parametrize("size", [64, 70])
@pytest.mark.filterwarnings("ignore")
def test_peft_adapters_compute_what_they_did(
    options: dict[str, Any],
    tied: bool,
    size: int,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Over resized embeddings or not, and where PEFT adapts both sides of tied ones as one."""
    peft = pytest.importorskip("peft")
    theirs = llama(tied)
    if size > 64:
        theirs.resize_token_embeddings(size, mean_resizing=False)
    theirs = peft.get_peft_model(
        theirs, peft.LoraConfig(r=2, lora_alpha=8, task_type="CAUSAL_LM", **options)
    ).eval()
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    ids = IDS % size
    with torch.no_grad():
        expected = theirs(ids).logits
        model = load_adapter(llama(tied), tmp_path / "theirs", untie=True)
        lost = not tied and size > 64 and "ensure_weight_tying" in options
        assert ("holds no rows of lm_head for its 6 new token ids" in caplog.text) == lost
        known = 64 if lost else size  # what PEFT's file does not hold, PEFT does not know either
        for each in (model, merge_lora(model)):
            ours = each(ids).logits[..., :known]
            torch.testing.assert_close(ours, expected[..., :known], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
def test_our_own_adapter_travels(tied: bool, tmp_path: Path) -> None:
    model = llama(tied)
    resize_embeddings(model, 70)
    config = LoRAConfig(r=2, targets=("q_proj",), modules_to_save=BOTH, untie=tied)
    inject_lora(model, config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    save_adapter(model, tmp_path / "ours", base="base")
    again = load_adapter(llama(tied), tmp_path / "ours", untie=True)
    torch.testing.assert_close(logits(again), logits(model))


def test_an_adapter_that_does_not_fit_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = llama(tied=False)
    resize_embeddings(model, 70)
    inject_lora(model, LoRAConfig(r=2, targets=("q_proj",), modules_to_save=BOTH))
    save_adapter(model, tmp_path / "ours", base="base")
    other = llama(tied=False)
    other.model.layers[0].self_attn.q_proj = torch.nn.Linear(16, 8)
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(AlignkitError, match="does not fit the model"):
        load_adapter(other, tmp_path / "ours")
    assert rows_before(other) is None and other.config.vocab_size == 64
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())
