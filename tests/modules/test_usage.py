"""What training takes of a device, as it is logged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback, Trainer
from transformers import AutoConfig, AutoModelForCausalLM

from alignkit import DPOModule, LoRAModule, SFTModule
from alignkit.modules import usage
from alignkit.modules.usage import flops_per_token
from tests.modules.helpers import answers, loader, trainer


def products(base: Path) -> int:
    """Count the weights of a llama's blocks, without norms."""
    c = AutoConfig.from_pretrained(base)
    head = c.hidden_size // c.num_attention_heads
    attention = 2 * c.hidden_size**2 + 2 * c.hidden_size * c.num_key_value_heads * head
    return c.num_hidden_layers * (attention + 3 * c.hidden_size * c.intermediate_size)


def test_flops_of_a_token(model_dir: Callable[[str], Path]) -> None:
    base = model_dir("llama")
    weights = pytest.approx(products(base), rel=0.02)  # norms are a percent
    adapters = SFTModule(str(base))
    trained = sum(p.numel() for p in adapters.parameters() if p.requires_grad)
    assert (flops_per_token(adapters) - 2 * trained) / 4 == weights
    assert flops_per_token(LoRAModule(str(base), lora=None)) / 6 == weights
    dpo = DPOModule(str(base))
    assert (flops_per_token(dpo) - 2 * trained) / 6 == weights


def test_experts_are_not_counted(model_dir: Callable[[str], Path], tmp_path: Path) -> None:
    config = AutoConfig.for_model(
        "mixtral", vocab_size=384, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip
    module = SFTModule(str(model_dir("llama")))
    module.model = AutoModelForCausalLM.from_config(config)
    assert flops_per_token(module) is None


def test_both_are_logged(
    model_dir: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a device whose peak is known; the utilisation is flops a token times tokens a second."""
    monkeypatch.setattr(usage, "get_available_flops", lambda device, dtype: 1e9)
    module = SFTModule(str(model_dir("llama")))
    seen: list[dict[str, float]] = []

    class Keep(Callback):
        def on_train_batch_end(self, run: Trainer, *_: Any) -> None:
            seen.append({name: float(value) for name, value in run.callback_metrics.items()})

    kept = trainer(tmp_path, max_steps=3, callbacks=[Keep()], log_every_n_steps=2)
    kept.fit(module, loader(answers(8), 2))
    # This callback comes before the one that logs, so that it sees a step's values at the next.
    assert ["train/mfu" in each for each in seen] == [False, False, True], "logged at step 2"
    expected = flops_per_token(module) * seen[1]["train/tokens_per_second"] / 1e9
    assert seen[2]["train/mfu"] == pytest.approx(expected, rel=1e-4)
    assert 0.05 < seen[2]["train/peak_memory_gib"] < 100


def test_an_unknown_device_has_no_utilisation(
    model_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    module = SFTModule(str(model_dir("llama")))
    run = trainer(tmp_path, max_steps=1, log_every_n_steps=1)
    run.fit(module, loader(answers(4), 2))
    assert "train/peak_memory_gib" in run.callback_metrics
    assert "train/mfu" not in run.callback_metrics
