"""PEFT reads what is exported as it is, on every architecture, or the export is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from alignkit.errors import AlignkitError
from alignkit.lora import LoRAConfig, inject_lora
from alignkit.models.export import export
from tests.architectures import built, tiny

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning:peft")

IDS = torch.arange(1, 20)[None]
READ, REFUSED = True, False
# What targets of an architecture PEFT reads as they are.
ARCHITECTURES: dict[str, dict[str, bool]] = {
    "llama": {"all-linear": READ, "embed_tokens": READ},
    "gpt2": {"all-linear": READ, "c_proj": READ, "wte": READ},
    "gpt_neox": {"all-linear": READ, "dense": READ},
    "ctrl": {"all-linear": READ},
    "mixtral": {"all-linear": READ},
    "phi3": {"all-linear": READ, "gate_up_proj": READ},
    "gpt_oss": {"all-linear": READ},
    "granitemoe": {"all-linear": READ},
    "qwen2_moe": {"(q|k|v|o)_proj": READ, "all-linear": REFUSED, "shared_expert_gate": READ},
    "qwen3_moe": {"(q|k|v|o)_proj": READ},
    "deepseek_v3": {"(q_b|kv_b|o)_proj": READ, "all-linear": REFUSED, "down_proj": REFUSED},
    "glm4_moe": {"(q|k|v|o)_proj": READ, "all-linear": REFUSED, "shared_experts.*": REFUSED},
    "ernie4_5_moe": {"(q|k|v|o)_proj": READ, "(gate|up)_proj": REFUSED},
    "dots1": {"(q|k|v|o)_proj": READ, "all-linear": REFUSED},
    "afmoe": {"(q|k|v|o)_proj": READ, "gate_proj": REFUSED},
    "laguna": {"(q|k|v|o)_proj": READ, "all-linear": REFUSED},
}
CASES = [(kind, targets) for kind, cases in ARCHITECTURES.items() for targets in cases]


def adapted(model: PreTrainedModel, targets: str, **options: Any) -> PreTrainedModel:
    names = targets if targets.isidentifier() or targets == "all-linear" else rf".*\.{targets}"
    inject_lora(model, LoRAConfig(r=2, alpha=8, targets=names, untie=True, **options))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(IDS).logits


@pytest.mark.parametrize(("kind", "targets"), CASES)
def test_read_as_it_is_or_refused(kind: str, targets: str, tmp_path: Path) -> None:
    base = built(tiny(kind))
    model = adapted(copy.deepcopy(base), targets)
    want = logits(model)
    if ARCHITECTURES[kind][targets] == REFUSED:
        with pytest.raises(AlignkitError, match="export --to merged"):
            export(model, tmp_path / "out", "peft")
        assert not (tmp_path / "out").exists()
        return
    export(model, tmp_path / "out", "peft")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "out").eval()
    assert (want - logits(built(tiny(kind)))).abs().max() > 0.01  # the adapter does something
    torch.testing.assert_close(logits(theirs), want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "options",
    [
        {"targets": ("q_proj", "v_proj"), "layers": "1"},
        {"targets": ("q_proj", "o_proj"), "exclude": r".*\.0\..*"},
        {"targets": r"model\.layers\.1\..*", "rank_pattern": {"q_proj": 4, r".*down_proj": 1}},
        {"targets": "q_proj", "modules_to_save": ("mlp",), "bias": "all"},
        {
            "targets": "all-linear",
            "alpha_pattern": {r"model\.layers\.0\..*": 3},
            "use_rslora": True,
        },
    ],
)
def test_however_the_modules_were_chosen(options: dict[str, Any], tmp_path: Path) -> None:
    base = built(tiny("llama"))
    settings = dict(options)
    targets = settings.pop("targets")
    model = copy.deepcopy(base)
    inject_lora(model, LoRAConfig(**{"r": 2, "alpha": 8, "targets": targets, **settings}))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    export(model, tmp_path, "peft")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-4, atol=1e-4)
