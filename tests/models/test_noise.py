"""Without ``dropout`` nothing in training mode is random, whatever the base keeps it in."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GPT2Config

from alignkit.engine import collate
from alignkit.errors import AlignkitError
from alignkit.lora import LoRAConfig
from alignkit.models.dropout import own_dropout, probabilities, zero_dropout, zeroed
from alignkit.models.export import export
from alignkit.models.noise import adapters_quiet, refuse_noise
from alignkit.modules import DPOModule, SFTModule
from tests.modules.helpers import answers, loader, logged_steps, pairs, trainer

SHAPE = {
    "vocab_size": 384,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
GROUPED = {**SHAPE, "num_key_value_heads": 2}
GPT_SHAPE = {"vocab_size": 384, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}

# Each keeps its dropout elsewhere: as floats on blocks and on attention, in configs that modules
# read in their forward pass, as layer drop, as jitter before a router.
BASES: dict[str, dict[str, Any]] = {
    "opt": {
        **SHAPE, "ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.3,
        "attention_dropout": 0.3, "activation_dropout": 0.3, "layerdrop": 0.3,
    },
    "gpt_bigcode": {**GPT_SHAPE, "attn_pdrop": 0.3, "resid_pdrop": 0.3, "embd_pdrop": 0.3},
    "seed_oss": {**GROUPED, "head_dim": 8, "attention_dropout": 0.3, "residual_dropout": 0.3},
    "biogpt": {
        **SHAPE, "attention_probs_dropout_prob": 0.3, "hidden_dropout_prob": 0.3,
        "activation_dropout": 0.3, "layerdrop": 0.3,
    },
    "gpt2": {**GPT_SHAPE, "attn_pdrop": 0.3, "resid_pdrop": 0.3, "embd_pdrop": 0.3},
    "gptj": {**GPT_SHAPE, "rotary_dim": 4, "attn_pdrop": 0.3, "resid_pdrop": 0.3},
    "gpt_neo": {
        **SHAPE, "num_layers": 2, "num_heads": 4, "attention_types": [[["global"], 2]],
        "attention_dropout": 0.3, "resid_dropout": 0.3, "embed_dropout": 0.3,
    },
    "falcon": {**SHAPE, "alibi": False, "attention_dropout": 0.3, "hidden_dropout": 0.3},
    "xglm": {
        **SHAPE, "d_model": 32, "ffn_dim": 64, "num_layers": 2, "attention_heads": 4,
        "dropout": 0.3, "attention_dropout": 0.3, "activation_dropout": 0.3, "layerdrop": 0.3,
    },
    "persimmon": {**SHAPE, "attention_dropout": 0.3, "hidden_dropout": 0.3},
    "mixtral": {
        **GROUPED, "num_local_experts": 4, "router_jitter_noise": 0.3, "attention_dropout": 0.3,
        "sliding_window": None,
    },
    "minimax": {
        **GROUPED, "num_local_experts": 4, "router_jitter_noise": 0.3,
        "layer_types": ["full_attention", "full_attention"],
    },
    "phimoe": {**GROUPED, "num_local_experts": 4, "input_jitter_noise": 0.3},
}  # fmt: skip


@pytest.fixture
def base(tmp_path: Path, tokenizer_dir: Path) -> Callable[[str], str]:
    """``base(kind)``: a directory with a tiny model whose probabilities are all 0.3."""

    def make(kind: str) -> str:
        ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
        torch.manual_seed(0)
        config = AutoConfig.for_model(kind, **BASES[kind], **ids)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        model.save_pretrained(tmp_path / kind)
        AutoTokenizer.from_pretrained(tokenizer_dir).save_pretrained(tmp_path / kind)
        return str(tmp_path / kind)

    return make


def tokens(model: nn.Module) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(torch.arange(3, 27)[None]).logits
    return logits


@pytest.mark.parametrize("kind", BASES)
def test_nothing_is_left_of_it(base: Callable[[str], str], kind: str) -> None:
    """As transformers runs it: two passes in training mode are one in evaluation."""
    model = AutoModelForCausalLM.from_pretrained(base(kind)).eval()
    for probability in probabilities(model):
        if probability.name == "router_jitter_noise" and kind == "phimoe":
            probability.set(0.0)  # evaluation reads it, see below
    expected = tokens(model)
    zero_dropout(model)
    assert zeroed(model)
    assert not list(probabilities(model))
    model.train()
    assert torch.equal(tokens(model), expected)
    assert torch.equal(tokens(model), expected)


DPO_BASES = [
    "opt", "gpt_bigcode", "seed_oss", "biogpt", "gpt2", "persimmon", "mixtral", "minimax",
]  # fmt: skip


@pytest.mark.parametrize("kind", DPO_BASES)
def test_dpo_starts_at_ln_2_in_training_mode(
    base: Callable[[str], str], tmp_path: Path, kind: str
) -> None:
    """Through the trainer: the first logged training loss, not what a check measures."""
    module = DPOModule(base(kind), lora=LoRAConfig(targets="all-linear"))
    logged = logged_steps(module)
    trainer(tmp_path, max_steps=2).fit(module, loader(pairs(4), 2))
    assert module.model.training
    assert logged["train/loss"][0] == pytest.approx(math.log(2), abs=1e-5)
    assert logged["train/loss"][1] != logged["train/loss"][0]


def test_a_router_that_samples_is_refused_by_name(base: Callable[[str], str]) -> None:
    """PhiMoE draws experts in training mode whatever its probabilities are."""
    with pytest.raises(AlignkitError, match=r"PhimoeTopKRouter \(model.layers.0.mlp.router\)"):
        SFTModule(base("phimoe"), lora=LoRAConfig(targets=["q_proj"]))


def test_what_evaluation_reads_is_given_back(base: Callable[[str], str]) -> None:
    """PhiMoE's ``router_jitter_noise`` also decides which experts count in evaluation."""
    model = AutoModelForCausalLM.from_pretrained(base("phimoe")).eval()
    before = tokens(model)
    zero_dropout(model)
    with pytest.raises(AlignkitError):
        refuse_noise(model)
    assert model.config.router_jitter_noise == 0.01
    assert model.model.layers[0].mlp.router.router_jitter_noise == 0.01
    assert model.config.input_jitter_noise == 0
    assert torch.equal(tokens(model), before)
    assert not any(each.name == "router_jitter_noise" for each in zeroed(model))


class Hidden(nn.Module):
    """A block of GPT-2 with noise under a name that says nothing, in one of three forms."""

    def __init__(self, block: nn.Module, form: str) -> None:
        super().__init__()
        self.block = block
        self.form = form
        self.strength = 1e-4

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        output = self.block(hidden, *args, **kwargs)
        if not self.training:
            return output
        if self.form == "skips" and torch.rand([]) < self.strength:
            return hidden
        if self.form == "coin" and torch.bernoulli(torch.tensor(self.strength)):
            return hidden
        if self.form == "jitters":
            return output + torch.rand_like(output) * self.strength
        if self.form == "shifts":
            return output.roll(1, -1)
        return output


@pytest.mark.parametrize("form", ["skips", "coin", "jitters", "shifts"])
def test_noise_under_any_name_is_refused_with_its_module(
    tiny_model: Callable[..., Any], form: str
) -> None:
    """A block skipped once in ten thousand times is seen as surely as any other noise."""
    model = tiny_model("gpt2")
    model.transformer.h[1] = Hidden(model.transformer.h[1], form)
    model.config.use_cache = False
    state = torch.get_rng_state()
    zero_dropout(model)
    with pytest.raises(AlignkitError, match=r"model.dropout=false: Hidden \(transformer.h.1\)"):
        refuse_noise(model)
    assert not model.training
    assert torch.equal(torch.get_rng_state(), state)
    model.transformer.h[1].form = "none"
    refuse_noise(model)


def test_zeroed_layer_drop_may_still_draw(base: Callable[[str], str]) -> None:
    """OPT draws a number a layer even where no layer can be dropped."""
    model = AutoModelForCausalLM.from_pretrained(base("opt")).eval()
    zero_dropout(model)
    refuse_noise(model)


def test_the_step_0_gate_sees_noise_that_comes_later(
    model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    """Scored in evaluation, as it was once, policy and reference would agree."""
    module = DPOModule(str(model_dir("gpt2")), lora=LoRAConfig(dropout=0.5))
    module.model.transformer.drop.p = 0.3
    with pytest.raises(AlignkitError, match="before the first step"):
        trainer(tmp_path, max_steps=1).fit(module, loader(pairs(2), 2))


def test_dropout_that_is_asked_for_stays(base: Callable[[str], str], tmp_path: Path) -> None:
    """Nothing is zeroed, nothing refused, and training is noisy."""
    module = DPOModule(base("opt"), lora=LoRAConfig(targets="all-linear"), dropout=True)
    assert module.model.config.layerdrop == 0.3
    assert module.model.model.decoder.layers[0].dropout == 0.3
    module.train()
    batch = collate(pairs(3))
    first, second = (module.compute_loss(batch).loss_sum for _ in range(2))
    assert not torch.equal(first, second)
    trainer(tmp_path, max_steps=1).fit(module, loader(pairs(2), 2))


def test_adapter_dropout_is_no_noise_of_the_base(model_dir: Callable[..., Path]) -> None:
    module = SFTModule(str(model_dir("llama")), lora={"targets": "all-linear", "dropout": 0.5})
    with torch.no_grad():
        for name, parameter in module.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    refuse_noise(module.model)
    module.train()
    batch = collate(answers(3))
    noisy = [module.compute_loss(batch).loss_sum.item() for _ in range(2)]
    assert noisy[0] != noisy[1]
    with adapters_quiet(module.model):
        quiet = [module.compute_loss(batch).loss_sum.item() for _ in range(2)]
    assert quiet[0] == quiet[1]
    assert all(m.training for m in module.model.modules())


@pytest.mark.parametrize("adapted", [True, False])
def test_an_export_has_the_dropout_of_its_base(
    base: Callable[[str], str], tmp_path: Path, adapted: bool
) -> None:
    """Zero was for this training; the model's config says what it always said."""
    lora = LoRAConfig(targets="all-linear") if adapted else None
    module = SFTModule(base("gpt2"), lora=lora)
    assert module.model.config.attn_pdrop == 0
    export(module.model, tmp_path / "merged", "merged")
    assert GPT2Config.from_pretrained(tmp_path / "merged").attn_pdrop == 0.3
    assert module.model.config.attn_pdrop == 0
    with own_dropout(module.model):
        assert module.model.transformer.drop.p == 0.3
    assert module.model.transformer.drop.p == 0
