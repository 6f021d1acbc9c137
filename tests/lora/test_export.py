"""Exports that others read with no alignkit installed."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from alignkit.errors import AlignkitError
from alignkit.lora import LoRAConfig, inject_lora, load_adapter
from alignkit.models.export import export

Make = Callable[..., PreTrainedModel]
Shake = Callable[..., nn.Module]


@pytest.mark.parametrize(
    "options",
    [
        {"targets": "all-linear", "use_dora": True},
        {"targets": "all-linear", "init": "olora", "bias": "all"},
        {"targets": ("embed_tokens", "embed_in", "wte"), "untie": True},
        {"targets": ("lm_head",), "untie": True},
        {"targets": "all-linear", "modules_to_save": ("lm_head", "mlp"), "untie": True},
    ],
)
def test_merged_is_a_plain_transformers_directory(
    tiny_model: Make,
    family: str,
    shake: Shake,
    ids: Tensor,
    tmp_path: Path,
    options: dict[str, object],
) -> None:
    model = tiny_model(family)
    if isinstance(options["targets"], tuple):  # the one of the names this family has
        there = [
            t for t in options["targets"] if any(n.endswith(t) for n, _ in model.named_modules())
        ]
        options = {**options, "targets": there}
    shake(inject_lora(model, LoRAConfig(**options)))  # type: ignore[arg-type]
    want = model(ids).logits
    names = [name for name, _ in model.named_modules()]
    export(model, tmp_path, "merged")
    assert [name for name, _ in model.named_modules()] == names
    assert torch.equal(model(ids).logits, want)
    plain, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    torch.testing.assert_close(plain.eval()(ids).logits, want, rtol=1e-4, atol=1e-4)
    assert "alignkit" not in (tmp_path / "config.json").read_text()


def test_merged_is_read_without_alignkit(tiny_model: Make, shake: Shake, tmp_path: Path) -> None:
    """A fresh interpreter that cannot import alignkit loads it and says the same."""
    model = shake(inject_lora(tiny_model("gpt2"), LoRAConfig(targets="lm_head", untie=True)))
    export(model, tmp_path, "merged")
    program = (
        "import sys, torch; sys.modules['alignkit'] = None\n"
        "from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})\n"
        "print(model(torch.tensor([[5, 9, 301]])).logits.double().sum().item())"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    want = model(torch.tensor([[5, 9, 301]])).logits.double().sum().item()
    assert float(run.stdout) == pytest.approx(want, abs=1e-3)


def test_merged_keeps_the_dtype_and_takes_a_tokenizer(
    tiny_model: Make, shake: Shake, ids: Tensor, tmp_path: Path, tokenizer_dir: Path
) -> None:
    from transformers import AutoTokenizer

    model = shake(inject_lora(tiny_model("gpt2").bfloat16()))
    export(model, tmp_path, "merged", tokenizer=AutoTokenizer.from_pretrained(tokenizer_dir))
    assert AutoModelForCausalLM.from_pretrained(tmp_path).dtype == torch.bfloat16
    assert AutoTokenizer.from_pretrained(tmp_path).eos_token == "<|endoftext|>"


def test_merged_of_a_model_without_adapters(tiny_model: Make, ids: Tensor, tmp_path: Path) -> None:
    model = tiny_model("llama")
    export(model, tmp_path, "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(again(ids).logits, model(ids).logits)


@pytest.mark.parametrize("start", ["gaussian", "pissa"])
def test_single_file(
    tiny_model: Make, shake: Shake, ids: Tensor, tmp_path: Path, start: str
) -> None:
    model = shake(inject_lora(tiny_model("gpt2"), LoRAConfig(init=start)))  # type: ignore[arg-type]
    assert export(model, tmp_path, "safetensors") == tmp_path / "adapter.safetensors"
    again = load_adapter(tiny_model("gpt2"), tmp_path / "adapter.safetensors")
    assert torch.equal(again(ids).logits, model(ids).logits)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_plain_turns_a_special_start_into_ordinary_lora(
    tiny_model: Make, shake: Shake, ids: Tensor, tmp_path: Path, start: str, rslora: bool
) -> None:
    """s (A B − A₀ B₀) = s [A A₀] [B; −B₀]: rank 8 becomes 16 at the same scale."""
    config = LoRAConfig(
        targets="all-linear",
        init=start,
        use_rslora=rslora,
        rank_pattern={"c_fc": 2},  # type: ignore[arg-type]
    )
    model = shake(inject_lora(tiny_model("gpt2"), config))
    export(model, tmp_path, "peft", plain=True)
    raw = json.loads((tmp_path / "adapter_config.json").read_text())
    assert raw["init_lora_weights"] is True
    assert raw["r"] == 16
    assert raw["rank_pattern"] == {"c_fc": 4}
    again = load_adapter(tiny_model("gpt2"), tmp_path)
    torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_exported_says_why(tiny_model: Make, tmp_path: Path) -> None:
    model = inject_lora(tiny_model("gpt2"), LoRAConfig(init="olora"))
    with pytest.raises(AlignkitError, match="PEFT cannot express init='olora' on Conv1D"):
        export(model, tmp_path / "a", "peft")
    with pytest.raises(AlignkitError, match="choose one of peft, merged, safetensors"):
        export(model, tmp_path / "a", "onnx")  # type: ignore[arg-type]
    with pytest.raises(AlignkitError, match="has no adapter"):
        export(tiny_model("gpt2"), tmp_path / "a", "peft")
    with pytest.raises(AlignkitError, match="Linear is no transformers model"):
        export(nn.Linear(2, 2), tmp_path / "a", "merged")
    assert not (tmp_path / "a").exists()
    export(model, tmp_path / "b", "peft", plain=True)
    with pytest.raises(AlignkitError, match="holds an adapter"):
        export(model, tmp_path / "b", "merged")


def test_transformers_own_saving_is_refused(tiny_model: Make, tmp_path: Path) -> None:
    """It would write names that from_pretrained does not find, and fill in random weights."""
    model = inject_lora(tiny_model("gpt2"))
    for injected in (model, copy.deepcopy(model)):
        with pytest.raises(AlignkitError, match=r"save_pretrained: .* to='merged'"):
            injected.save_pretrained(tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()
    export(model, tmp_path / "right", to="merged")
    assert (tmp_path / "right" / "model.safetensors").exists()
