"""Shared by the LoRA tests: the target names of each family, and adapters that do something."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from alignkit.lora import LoRAConfig, inject_lora, save_adapter

Make = Callable[..., PreTrainedModel]
Shake = Callable[..., nn.Module]

ATTENTION = {
    "gpt2": ("attn.c_attn", "attn.c_proj"),
    "gpt_neox": ("query_key_value", "attention.dense"),
    "llama": ("q_proj", "v_proj", "o_proj"),
}


@pytest.fixture
def attention() -> dict[str, tuple[str, ...]]:
    """The attention projections of each family, as targets."""
    return ATTENTION


@pytest.fixture
def shake() -> Callable[..., nn.Module]:
    """``shake(model)``: move every trainable parameter at random, as training would."""

    def move(model: nn.Module, seed: int = 1, size: float = 0.05) -> nn.Module:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter += size * torch.randn(parameter.shape, generator=generator)
        return model

    return move


@pytest.fixture
def ids() -> torch.Tensor:
    """[2, 9] token ids."""
    return torch.randint(0, 384, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def trained(tiny_model: Make, shake: Shake) -> PreTrainedModel:
    """A gpt2 with a moved adapter of rank 4."""
    config = LoRAConfig(r=4, targets=("attn.c_attn", "attn.c_proj"))
    model: PreTrainedModel = shake(inject_lora(tiny_model("gpt2"), config))
    return model


@pytest.fixture
def saved(trained: PreTrainedModel, tmp_path: Path) -> Path:
    """That adapter's directory."""
    return save_adapter(trained, tmp_path / "adapter")
