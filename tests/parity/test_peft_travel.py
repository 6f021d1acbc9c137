"""Adapters that travel: alignkit → PEFT → alignkit and PEFT → alignkit → PEFT, tensor by tensor."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from alignkit.lora import LoRAConfig, combine_adapters, inject_lora, load_adapter, save_adapter
from alignkit.lora.peft_files import WEIGHTS_FILE
from alignkit.models.export import export

peft = pytest.importorskip("peft")

# PEFT tells at length what it does with Conv1D, tied layers and adapted embeddings, and calls
# what transformers has deprecated.
pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore::FutureWarning", "ignore::RuntimeWarning:peft"
)

Make = Callable[..., PreTrainedModel]

IDS = torch.randint(0, 384, (2, 9), generator=torch.Generator().manual_seed(0))
ATTENTION = {
    "gpt2": ("attn.c_attn", "attn.c_proj"),
    "gpt_neox": ("query_key_value", "dense"),
    "llama": ("q_proj", "v_proj"),
}
EMBEDDING = {"gpt2": ("wte", "wpe"), "gpt_neox": ("embed_in",), "llama": ("embed_tokens",)}

FINAL_NORM = {"gpt2": "ln_f", "gpt_neox": "final_layer_norm", "llama": "norm"}

OURS: dict[str, dict[str, Any]] = {
    "plain": {},
    "alpha and dropout": {"alpha": 2.5, "dropout": 0.1},
    "kaiming": {"init": "kaiming"},
    "rslora dora": {"use_rslora": True, "use_dora": True},
    "pissa": {"init": "pissa"},
    "pissa dora": {"init": "pissa", "use_dora": True},
    "orthogonal": {"init": "orthogonal"},
    "olora": {"init": "olora"},
    "all-linear": {"targets": "all-linear", "exclude": r".*\.1\..*mlp.*"},
    "regex and layers": {"targets": r".*(attn|attention).*", "layers": "1"},
    "layers": {"layers": (0,)},
    "patterns": {"rank_pattern": {r".*\.1\..*": 2}, "alpha_pattern": {r".*\.0\..*": 3}},
    "bias all": {"bias": "all"},
    "modules_to_save": {"modules_to_save": ("mlp",)},
    # PEFT takes "norm" for the end of every name, alignkit for a whole part of the path.
    "final norm": {"modules_to_save": FINAL_NORM},
    "bias lora_only": {"bias": "lora_only", "use_dora": True},
    "embedding": {"targets": EMBEDDING, "untie": True},
    "embedding dora": {"targets": EMBEDDING, "untie": True, "use_dora": True},
    "head": {"targets": "lm_head", "untie": True},
    "head saved": {"modules_to_save": ("lm_head",), "untie": True},
}


def move(model: Any) -> Any:
    """Move what trains, as training would."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def same_files(first: Path, second: Path) -> None:
    a, b = (load_file(path / WEIGHTS_FILE) for path in (first, second))
    assert a.keys() == b.keys()
    for key, tensor in a.items():
        assert torch.equal(tensor, b[key]), key


@pytest.mark.parametrize("case", OURS)
def test_there_and_back(tiny_model: Make, family: str, case: str, tmp_path: Path) -> None:
    """alignkit → PEFT: the same logits; PEFT saves it again: the same tensors, read here again."""
    options = {"r": 4, "alpha": 8, "targets": ATTENTION[family]} | OURS[case]
    options = {k: v[family] if v in (EMBEDDING, FINAL_NORM) else v for k, v in options.items()}
    model = move(inject_lora(tiny_model(family), LoRAConfig(**options)))
    # PEFT's OLoRA does not fit Conv1D, so there it travels as ordinary LoRA of twice the rank.
    export(model, tmp_path / "ours", "peft", plain=(case, family) == ("olora", "gpt2"))
    theirs = peft.PeftModel.from_pretrained(tiny_model(family), tmp_path / "ours").eval()
    want = model(IDS).logits
    torch.testing.assert_close(theirs(IDS).logits, want, rtol=1e-5, atol=1e-5)
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    same_files(tmp_path / "ours", tmp_path / "theirs")
    back = load_adapter(tiny_model(family), tmp_path / "theirs", untie=True)
    torch.testing.assert_close(back(IDS).logits, want, rtol=1e-5, atol=1e-5)


THEIRS: dict[str, dict[str, Any]] = {
    "plain": {},
    "gaussian rslora": {"init_lora_weights": "gaussian", "use_rslora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "orthogonal dora": {"init_lora_weights": "orthogonal", "use_dora": True},
    "all-linear": {"target_modules": "all-linear"},
    "regex": {"target_modules": r".*\.1\..*(attn|attention).*"},
    "layers": {"layers_to_transform": [1]},
    "bias all": {"bias": "all"},
    "modules_to_save": {"modules_to_save": ["mlp"]},
    "every norm": {"modules_to_save": ["norm", "ln_1"]},  # gpt_neox: every …layernorm
    "head": {"target_modules": ["lm_head"]},
    # Entries that match nothing are no matter to PEFT as long as one target does.
    "unused entries": {"rank_pattern": {"nowhere": 2}, "exclude_modules": ["nowhere"]},
}


@pytest.mark.parametrize("case", THEIRS)
def test_here_and_back(tiny_model: Make, family: str, case: str, tmp_path: Path) -> None:
    """PEFT → alignkit: the same logits; alignkit saves it again: tensors and settings are equal."""
    options = {"r": 4, "lora_alpha": 8, "target_modules": list(ATTENTION[family])} | THEIRS[case]
    if options["target_modules"] == r".*\.1\..*(attn|attention).*":
        # PEFT refuses names that are no linear layer, so the expression ends in the projections.
        options["target_modules"] += "(q_proj|dense|query_key_value|c_attn|c_proj)"
    config = peft.LoraConfig(task_type="CAUSAL_LM", **options)
    theirs = move(peft.get_peft_model(tiny_model(family), config))
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    ours = load_adapter(tiny_model(family), tmp_path / "theirs", untie=True)
    want = theirs(IDS).logits
    torch.testing.assert_close(ours(IDS).logits, want, rtol=1e-5, atol=1e-5)
    save_adapter(ours, tmp_path / "ours")
    same_files(tmp_path / "theirs", tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(tiny_model(family), tmp_path / "ours").eval()
    torch.testing.assert_close(back(IDS).logits, want, rtol=1e-5, atol=1e-5)
    before, after = (
        json.loads((tmp_path / side / "adapter_config.json").read_text())
        for side in ("theirs", "ours")
    )
    same = (
        "peft_type task_type r lora_alpha lora_dropout bias use_rslora use_dora init_lora_weights "
        "modules_to_save inference_mode fan_in_fan_out layers_to_transform alpha_pattern"
    )
    for key in same.split():
        if not (case == "every norm" and key == "modules_to_save"):  # whole paths, see saved_names
            assert after[key] == before[key], key


def test_a_weighted_sum_travels(tiny_model: Make, tmp_path: Path) -> None:
    """The sum of two adapters of unlike ranks and targets is ordinary LoRA to PEFT."""
    model = tiny_model("llama")
    move(inject_lora(model, LoRAConfig(targets=("q_proj", "v_proj"), r=2), "a"))
    move(inject_lora(model, LoRAConfig(targets=("v_proj", "up_proj"), r=3, init="pissa"), "b"))
    combine_adapters(model, {"a": 0.5, "b": -1.5}, "mix")
    save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(tiny_model("llama"), tmp_path).eval()
    torch.testing.assert_close(theirs(IDS).logits, model(IDS).logits, rtol=1e-5, atol=1e-5)


def test_whole_heads_that_peft_saves_are_checked_and_left_out(
    tiny_model: Make, tmp_path: Path
) -> None:
    """By default PEFT writes an adapted head's base weight too; alignkit compares it."""
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["lm_head"])
    theirs = move(peft.get_peft_model(tiny_model("llama"), config))
    theirs.save_pretrained(tmp_path)
    assert any("base_layer" in key for key in load_file(tmp_path / WEIGHTS_FILE))
    ours = load_adapter(tiny_model("llama"), tmp_path)
    torch.testing.assert_close(ours(IDS).logits, theirs(IDS).logits, rtol=1e-5, atol=1e-5)


def test_peft_writes_saved_modules_biases_three_times(tiny_model: Make, tmp_path: Path) -> None:
    """``bias="all"`` with ``modules_to_save``: its wrappers' names are copies, read past here."""
    config = LoRAConfig(targets="attn.c_attn", bias="all", modules_to_save=("mlp",))
    model = move(inject_lora(tiny_model("gpt2"), config))
    save_adapter(model, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(tiny_model("gpt2"), tmp_path / "ours").eval()
    torch.testing.assert_close(theirs(IDS).logits, model(IDS).logits, rtol=1e-5, atol=1e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    assert any("original_module" in k for k in load_file(tmp_path / "theirs" / WEIGHTS_FILE))
    back = load_adapter(tiny_model("gpt2"), tmp_path / "theirs")
    assert torch.equal(back(IDS).logits, model(IDS).logits)


def test_transformers_own_loader_reads_ours(tiny_model: Make, tmp_path: Path) -> None:
    """``model.load_adapter`` of transformers, PEFT's other door."""
    model = move(inject_lora(tiny_model("llama"), LoRAConfig(targets=("q_proj", "v_proj"))))
    save_adapter(model, tmp_path)
    other = tiny_model("llama")
    other.load_adapter(str(tmp_path))
    torch.testing.assert_close(other(IDS).logits, model(IDS).logits, rtol=1e-5, atol=1e-5)


def test_bf16_merge_is_nearer_the_truth_than_pefts(tiny_model: Make, tmp_path: Path) -> None:
    """Merged bf16 weights against fp32: one rounding here, and the original comes back exactly."""
    truth = move(inject_lora(tiny_model("llama").bfloat16().float(), LoRAConfig(targets="q_proj")))
    save_adapter(truth, tmp_path)
    path = "model.layers.0.self_attn.q_proj"
    exact = truth.get_submodule(path).direction(truth.get_submodule(path).adapter("default")).t()
    ours = load_adapter(tiny_model("llama").bfloat16(), tmp_path)
    theirs = peft.PeftModel.from_pretrained(tiny_model("llama").bfloat16(), tmp_path)
    before = ours.get_submodule(path).base.weight.clone()
    ours.get_submodule(path).merge()
    layer = theirs.base_model.model.get_submodule(path)
    layer.merge()
    mine = (ours.get_submodule(path).base.weight.float() - exact).abs().max()
    assert mine <= (layer.base_layer.weight.float() - exact).abs().max()
    layer.unmerge()
    ours.get_submodule(path).unmerge()
    assert torch.equal(ours.get_submodule(path).base.weight, before)
    assert not torch.equal(layer.base_layer.weight, before)
