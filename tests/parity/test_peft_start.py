"""A stage starts from an adapter that PEFT trained, without being told what it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from alignkit import DPOModule, SFTModule
from alignkit.engine import collate, score
from alignkit.errors import AlignkitError
from alignkit.lora import LoRAConfig
from alignkit.lora.adapter import adapter_layers
from alignkit.models import load_model
from alignkit.models.checkpoint import load_policy
from tests.modules.helpers import answers, pairs
from tests.modules.test_checkpoints import fit

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning:peft")

BATCH = collate(pairs(3))

ADAPTERS: dict[str, dict[str, Any]] = {
    "names": {"target_modules": ["q_proj", "v_proj"], "r": 3, "lora_alpha": 5},
    "a regular expression": {"target_modules": r".*\.1\..*(q|up)_proj", "use_rslora": True},
    "patterns": {
        "target_modules": ["q_proj", "o_proj"],
        "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {"o_proj": 7},
    },
    "layers": {
        "target_modules": ["q_proj"],
        "layers_to_transform": [1],
        "layers_pattern": "layers",
    },
    "all-linear": {"target_modules": "all-linear", "exclude_modules": ["k_proj"]},
    "modules to save": {"target_modules": ["q_proj"], "modules_to_save": ["mlp"], "bias": "all"},
    "embeddings": {"target_modules": ["embed_tokens", "q_proj"]},
    "a head": {"target_modules": ["lm_head"]},
    "dora": {"target_modules": ["q_proj"], "use_dora": True, "lora_dropout": 0.2},
    "pissa": {"target_modules": ["v_proj"], "init_lora_weights": "pissa"},
}


@pytest.fixture(params=["own head", "tied head"])
def base(request: pytest.FixtureRequest, model_dir: Callable[[str], Path], tmp_path: Path) -> str:
    """A llama whose head is its own, or its embedding's."""
    if request.param == "own head":
        return str(model_dir("llama"))
    import shutil

    shutil.copytree(model_dir("llama"), tmp_path / "tied")
    model = AutoModelForCausalLM.from_pretrained(model_dir("llama"), dtype=torch.float32)
    config = model.config
    config.tie_word_embeddings = True
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "tied")
    return str(tmp_path / "tied")


@pytest.mark.parametrize("case", ADAPTERS)
def test_it_takes_the_adapters_own_settings(case: str, base: str, tmp_path: Path) -> None:
    """Policy and reference score as PEFT's model does; the next stage needs no word either."""
    options = {"r": 4, "lora_alpha": 8} | ADAPTERS[case]
    torch.manual_seed(0)
    theirs = peft.get_peft_model(
        load_model(base), peft.LoraConfig(task_type="CAUSAL_LM", **options)
    )
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)
    theirs.eval()
    theirs.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    module = DPOModule(base, init_from=str(tmp_path / "adapter"))
    module.model.eval()
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        want = theirs(ids).logits
        torch.testing.assert_close(module.model(ids).logits, want, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(module.reference.model(ids).logits, want, rtol=1e-4, atol=1e-4)
    path = fit(module, tmp_path / "run", 1, pairs(2))
    module.model.eval()
    policy, _ = load_policy(str(path))
    torch.testing.assert_close(score(policy, BATCH), score(module.model, BATCH))
    again = SFTModule(base, init_from=str(path))
    assert again.lora == module.lora


def test_what_is_said_beside_it_must_agree(base: str, tmp_path: Path) -> None:
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=["q_proj"])
    peft.get_peft_model(load_model(base), config).save_pretrained(tmp_path)
    same = LoRAConfig(r=4, alpha=8, targets=r".*q_proj")
    module = SFTModule(base, lora=same, init_from=str(tmp_path))
    assert module.lora == same
    fit(module, tmp_path / "run", 1, answers(2))
    with pytest.raises(
        AlignkitError, match=r"lora.alpha is 8 there and 16 here.*--model.lora auto"
    ):
        SFTModule(base, lora=LoRAConfig(r=4, targets="q_proj"), init_from=str(tmp_path))


def test_weights_that_peft_ties_are_read(tmp_path: Path, base: str) -> None:
    """PEFT writes both sides; trained further, each goes its own way."""
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True
    )
    model = load_model(base)
    tied = model.config.tie_word_embeddings
    peft.get_peft_model(model, config).save_pretrained(tmp_path, save_embedding_layers=False)
    module = SFTModule(base, init_from=str(tmp_path))
    assert ("lm_head" in adapter_layers(module.model)) == tied
