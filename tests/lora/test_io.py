"""Adapter directories: round trips, and one clear line for whatever can be wrong with one."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from alignkit.lora import (
    LoRAConfig,
    adapter_configs,
    adapter_state_dict,
    inject_lora,
    load_adapter,
    save_adapter,
    save_adapter_file,
    set_adapter,
    trainable_parameter_count,
)
from alignkit.lora.peft_files import read_tensors

Make = Callable[..., PreTrainedModel]
Shake = Callable[..., nn.Module]

A = "base_model.model.transformer.h.0.attn.c_attn.lora_A.weight"


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"init": "pissa", "use_dora": True, "r": 4},
        {"init": "olora"},
        {"init": "orthogonal", "dropout": 0.1},
        {"targets": "all-linear", "use_rslora": True, "layers": "1"},
        {"targets": r".*\.(up|gate)_proj", "exclude": r".*\.0\..*", "alpha": 2.5},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {r"layers\.1\..*": 3.0}},
        {"targets": ("embed_tokens", "lm_head", "v_proj"), "use_dora": True},
        {"modules_to_save": ("norm", "mlp"), "bias": "all"},
    ],
)
def test_round_trip(
    tiny_model: Make, shake: Shake, ids: Tensor, tmp_path: Path, options: dict[str, object]
) -> None:
    if options.get("init") == "olora":
        options = {**options, "targets": "q_proj"}
    config = LoRAConfig(**{"targets": ("q_proj", "v_proj"), **options})  # type: ignore[arg-type]
    model = shake(inject_lora(tiny_model("llama"), config))
    save_adapter(model, tmp_path)
    again = load_adapter(tiny_model("llama"), tmp_path)
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert adapter_state_dict(again).keys() == adapter_state_dict(model).keys()
    assert trainable_parameter_count(again) == trainable_parameter_count(model)
    save_adapter(again, tmp_path / "again")
    first, second = (
        load_file(p / "adapter_model.safetensors") for p in (tmp_path, tmp_path / "again")
    )
    assert first.keys() == second.keys()
    for key, tensor in first.items():
        assert torch.equal(tensor, second[key])


def test_into_an_adapter_that_is_there(
    tiny_model: Make, trained: PreTrainedModel, saved: Path, ids: Tensor
) -> None:
    model = load_adapter(
        inject_lora(tiny_model("gpt2"), LoRAConfig(r=4, targets=("attn.c_attn", "attn.c_proj"))),
        saved,
    )
    assert torch.equal(model(ids).logits, trained(ids).logits)


def test_beside_another_and_frozen(
    tiny_model: Make, trained: PreTrainedModel, saved: Path, ids: Tensor
) -> None:
    model = inject_lora(tiny_model("gpt2"), LoRAConfig(targets="c_fc"), "mine")
    load_adapter(model, saved, name="theirs", trainable=False)
    assert torch.equal(model(ids).logits, trained(ids).logits)
    assert trainable_parameter_count(model) == 0
    assert set(adapter_configs(model)) == {"mine", "theirs"}
    set_adapter(model, "mine")
    save_adapter(model, saved.parent / "theirs", name="theirs")
    theirs = load_file(saved.parent / "theirs" / "adapter_model.safetensors")
    assert all(
        torch.equal(theirs[k], v) for k, v in load_file(saved / "adapter_model.safetensors").items()
    )


def test_files_are_pefts(saved: Path) -> None:
    with safe_open(saved / "adapter_model.safetensors", "pt") as file:
        assert file.metadata()["format"] == "pt"
        assert file.get_tensor(A).shape == (4, 32)
        assert file.get_tensor(A.replace("lora_A", "lora_B")).shape == (96, 4)
    config = json.loads((saved / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert config["task_type"] == "CAUSAL_LM"
    assert config["fan_in_fan_out"] is True
    assert config["target_modules"] == ["attn.c_attn", "attn.c_proj"]
    assert config["r"] == 4
    assert config["lora_alpha"] == 16
    assert not [path for path in saved.iterdir() if path.name.startswith(".")]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="shows what is mapped on Linux")
def test_what_was_read_is_not_mapped_any_more(saved: Path) -> None:
    """Windows replaces no file that is."""
    path = saved / "adapter_model.safetensors"
    tensors, _ = read_tensors(path)
    assert tensors
    assert str(path) not in Path("/proc/self/maps").read_text()


def test_one_file_holds_it_all(
    tiny_model: Make, trained: PreTrainedModel, tmp_path: Path, ids: Tensor
) -> None:
    path = save_adapter_file(trained, tmp_path / "one" / "adapter.safetensors", base="some/model")
    model = load_adapter(tiny_model("gpt2"), path)
    assert torch.equal(model(ids).logits, trained(ids).logits)


def test_another_base_by_name_is_a_warning(
    tiny_model: Make, trained: PreTrainedModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_adapter(trained, tmp_path, base="org/base-a")
    model = tiny_model("gpt2")
    model.config._name_or_path = "org/base-b"
    with caplog.at_level(logging.WARNING, "alignkit"):
        load_adapter(model, tmp_path)
    assert "was trained on org/base-a; the model here is org/base-b" in caplog.text


def test_links_within_the_hubs_cache_are_followed(
    tiny_model: Make, saved: Path, tmp_path: Path
) -> None:
    snapshot = tmp_path / "models--org--a" / "snapshots" / "0f"
    blobs = tmp_path / "models--org--a" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in saved.iterdir():
        shutil.move(path, blobs / path.name)
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    load_adapter(tiny_model("gpt2"), snapshot)
