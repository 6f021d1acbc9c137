"""`--model.quantize` through the command line."""

from __future__ import annotations

from collections.abc import Callable
from math import log
from pathlib import Path

import pytest
import torch

from alignkit.models.checkpoint import load_policy, read_checkpoint
from alignkit.models.quantize import quantization
from alignkit.tools.curves import read_scalars
from tests.cli.test_fit import quick


@pytest.mark.parametrize("to", ["nf4", "int8"])
def test_a_quantized_base_trains_and_loads_again(
    to: str, alignkit: Callable, model_dir: Callable, hh: Path, text: Path, workplace: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    given = quick("demo/dpo.yaml", model_dir, hh, text, 2)
    status, _, err = alignkit(*given, "--model.quantize", to, "--model.optimizer.lr", 0.01)
    assert status == 0, err
    losses = read_scalars(Path("runs/demo/dpo"))["train/loss"]
    assert abs(losses[0][1] - log(2)) < 1e-3
    policy, _ = load_policy("runs/demo/dpo")
    assert quantization(policy) == to
    newest = next(Path("runs/demo/dpo").rglob("last.ckpt"))
    state = read_checkpoint(str(newest))["state_dict"]
    assert state and all("lora" in name.lower() for name in state)
    assert any(t.abs().max() > 0 for n, t in state.items() if n.endswith("lora_B"))
    assert all(torch.isfinite(tensor).all() for tensor in state.values())


def test_gpt2_has_nothing_to_quantize(
    alignkit: Callable, model_dir: Callable, hh: Path, text: Path, workplace: Path
) -> None:
    """Its layers are transformers' Conv1D."""
    pytest.importorskip("bitsandbytes")
    given = quick("lora_owt_gpt2.yaml", model_dir, hh, text, 1)
    status, _, err = alignkit(*given, "--model.quantize", "nf4")
    assert status == 2
    line = err.strip().splitlines()[-1]
    assert "model.quantize: GPT2LMHeadModel has no torch.nn.Linear to quantize" in line
