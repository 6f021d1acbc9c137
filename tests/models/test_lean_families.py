"""Norms and MLPs are lightened by what they compute, whatever the family that wrote them."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from alignkit.lora import LoRAConfig, inject_lora
from alignkit.models.lean import lean_modules

LAYERS = 2
# Of each family: norms in a block (those of queries and keys among them), its MLP and the last.
LIGHTENED = {
    "Llama": LAYERS * (2 + 1) + 1,
    "Qwen2": LAYERS * (2 + 1) + 1,
    "Qwen3": LAYERS * (4 + 1) + 1,
    "Mistral": LAYERS * (2 + 1) + 1,
    "Gemma": LAYERS * (2 + 1) + 1,
    "Gemma2": LAYERS * (4 + 1) + 1,
    "Gemma3Text": LAYERS * (6 + 1) + 1,
    "Olmo2": LAYERS * (4 + 1) + 1,
    "Phi3": LAYERS * (2 + 1) + 1,
    "Granite": LAYERS * (2 + 1) + 1,
    "GPT2": LAYERS * (2 + 1) + 1,
    "GPTNeoX": LAYERS * 2 + 1,  # its MLP is neither gated nor GPT-2's
    "Olmo": LAYERS,  # its norms have no weight
    "Phi": LAYERS * (1 + 1) + 1,
    "Glm": LAYERS * (2 + 1) + 1,
    "StableLm": LAYERS * (2 + 1) + 1,
    "SmolLM3": LAYERS * (2 + 1) + 1,
    "Cohere": LAYERS,  # its norms take the mean away and have no bias
    "Nemotron": 0,  # LayerNorm scaled by 1 + w, and an MLP without a gate
}
LEFT = {"GPTNeoX": LAYERS, "Olmo": LAYERS * 2 + 1, "Cohere": LAYERS + 1, "Nemotron": LAYERS * 3 + 1}


def random_model(name: str, **changes: Any) -> PreTrainedModel:
    """Two layers in fp32, no weight of a norm near 1."""
    shape = {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    if name not in ("GPT2", "GPTNeoX"):
        shape["num_key_value_heads"] = 2
    if name.startswith(("Gemma", "Qwen3", "Glm")):
        shape["head_dim"] = 8
    config = getattr(transformers, f"{name}Config")(**shape, **changes)
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def logits_and_gradients(model: nn.Module) -> list[Tensor]:
    ids = torch.arange(1, 41)[None] * 7 % 96
    logits = model(ids).logits
    loss = F.cross_entropy(logits[0, :-1], ids[0, 1:])
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [logits.detach(), *torch.autograd.grad(loss, trained)]


@pytest.mark.parametrize("name", LIGHTENED)
def test_every_family_is_lightened_and_computes_the_same(name: str) -> None:
    model = random_model(name)
    before, classes = logits_and_gradients(model), [type(module) for module in model.modules()]
    names = list(model.state_dict())
    assert lean_modules(model) == LIGHTENED[name]
    total = LIGHTENED[name] + LEFT.get(name, 0)
    assert model.lightened == f"{LIGHTENED[name]} of {total} norms and MLPs lightened"
    for ours, theirs in zip(logits_and_gradients(model), before, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert list(model.state_dict()) == names
    if name not in ("GPT2", "Phi"):  # whose activation becomes another module
        assert all(map(isinstance, model.modules(), classes))
    assert lean_modules(model) == 0


class OutsideTheRoot(LlamaRMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x / (x.square().mean(-1, keepdim=True).sqrt() + self.variance_epsilon)


class Offset(LlamaRMSNorm):  # an fp32 weight promotes, so neither Llama's norm nor Gemma's
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1 + 1 / self.weight)


class Clamped(LlamaRMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).clamp(-100, 100)


class Centred(LlamaRMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.mean(-1, keepdim=True))


class TwiceScaled(LlamaRMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1 + self.weight)


class HalfOnly(LlamaRMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1 if x.dtype == torch.float32 else 2)


class NoGradient(LlamaRMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.detach() + (x - x.detach()) * 2)


class ClampedMLP(LlamaMLP):
    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate_proj(x).clamp(max=7)
        return self.down_proj(F.silu(gate) * self.up_proj(x))


class PlusOneMLP(LlamaMLP):
    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * (self.up_proj(x) + 1))


class SwappedMLP(LlamaMLP):
    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))


class DropoutMLP(LlamaMLP):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(super().forward(x))


def mlp(kind: type[LlamaMLP], activation: str = "silu", bias: bool = False) -> LlamaMLP:
    return kind(LlamaConfig(hidden_size=32, hidden_act=activation, mlp_bias=bias))


@pytest.mark.parametrize(
    "kind",
    [OutsideTheRoot, Offset, Clamped, Centred, TwiceScaled, HalfOnly, NoGradient],
)
@pytest.mark.parametrize("epsilon", [1e-5, 1e-12])
def test_a_norm_that_differs_in_one_detail_is_left_alone(
    kind: type[LlamaRMSNorm], epsilon: float
) -> None:
    assert lean_modules(LlamaRMSNorm(64, eps=epsilon)) == 1
    assert lean_modules(norm := kind(64, eps=epsilon)) == 0
    assert type(norm) is kind


@pytest.mark.parametrize("kind", [ClampedMLP, PlusOneMLP, SwappedMLP, DropoutMLP])
def test_an_mlp_that_differs_in_one_detail_is_left_alone(kind: type[LlamaMLP]) -> None:
    assert lean_modules(module := mlp(kind)) == 0
    assert type(module) is kind


@pytest.mark.parametrize("activation", ["gelu", "relu", "quick_gelu", "sigmoid", "mish"])
def test_other_activations_are_left_alone(activation: str) -> None:
    assert lean_modules(mlp(LlamaMLP, activation)) == 0


@pytest.mark.parametrize("activation", ["silu", "gelu_pytorch_tanh"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_an_mlp_with_biases_is_lightened(activation: str, dtype: torch.dtype) -> None:
    old = mlp(LlamaMLP, activation, bias=True).to(dtype)
    new = copy.deepcopy(old)
    assert lean_modules(new) == 1
    x = torch.randn(5, 32, dtype=dtype)
    torch.testing.assert_close(new(x), old(x), rtol=3e-2, atol=1e-5 if x.itemsize == 4 else 1e-2)


def test_settings_are_proven_each() -> None:
    """Two norms of one class in one model, one of which has another forward pass or setting."""

    class Switched(LlamaRMSNorm):
        square: bool = False

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * (self.weight if self.square else 1)

    pair = nn.ModuleList([Switched(8), Switched(8)])
    pair[1].square = True
    assert lean_modules(pair) == 1
    patched: Any = LlamaRMSNorm(8)
    patched.forward = lambda x: x
    assert lean_modules(patched) == 0


def saved(model: PreTrainedModel) -> PreTrainedModel:
    return pickle.loads(pickle.dumps(model))  # type: ignore[no-any-return]


@pytest.mark.parametrize("duplicate", [copy.deepcopy, saved], ids=["deepcopy", "pickle"])
def test_copies_are_light_and_apart(duplicate: Callable[[nn.Module], nn.Module]) -> None:
    model = random_model("Gemma2")
    lean_modules(model)
    other = duplicate(model)
    expected = logits_and_gradients(model)
    for ours, theirs in zip(logits_and_gradients(other), expected, strict=True):
        assert torch.equal(ours, theirs)
    assert [type(m) for m in other.modules()] == [type(m) for m in model.modules()]
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert torch.equal(logits_and_gradients(model)[0], expected[0])


def noted(calls: list[str], path: str, *_: object) -> None:
    calls.append(path)


@pytest.mark.parametrize("name", ["Qwen3", "Phi3", "Gemma"])
def test_adapters_and_hooks_take_part(name: str) -> None:
    """LoRA in the MLP's layers trains as without lightening; hooks on it and them are called."""
    plain, light = random_model(name), random_model(name)
    assert lean_modules(light) == LIGHTENED[name]
    results = []
    for model in (plain, light):
        torch.manual_seed(1)
        inject_lora(model, LoRAConfig(targets="all-linear", init="gaussian"))
        calls: list[str] = []
        for path, module in model.named_modules():
            if path.endswith(("mlp", "_proj", "norm")):
                module.register_forward_hook(partial(noted, calls, path))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        results.append((logits_and_gradients(model), sorted(calls)))
        assert any("mlp.down_proj" in call for call in calls)
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-5, atol=1e-5)
    assert results[1][1] == results[0][1]


def test_the_proof_draws_nothing_from_the_global_generator() -> None:
    torch.manual_seed(3)
    expected = torch.randn(4)
    model = random_model("Qwen2")
    torch.manual_seed(3)
    with torch.inference_mode():
        lean_modules(model)
    assert torch.equal(torch.randn(4), expected)


def test_a_meta_module_is_swapped_too() -> None:
    with torch.device("meta"):
        norms = nn.ModuleList([LlamaRMSNorm(8), Qwen3RMSNorm(8)])
    assert lean_modules(norms) == 2
    assert all(norm.weight.is_meta for norm in norms)


def test_weights_save_and_load_as_before() -> None:
    model = random_model("Olmo2")
    lean_modules(model)
    torch.save(model.state_dict(), buffer := io.BytesIO())
    buffer.seek(0)
    fresh = random_model("Olmo2")
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    torch.testing.assert_close(
        logits_and_gradients(fresh), logits_and_gradients(model), rtol=1e-5, atol=1e-5
    )
