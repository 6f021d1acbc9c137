"""The lighter modules compute what transformers' compute and keep less for the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import LlamaConfig, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from alignkit.models import lean as models_lean
from alignkit.models import load_model
from alignkit.models.lean import lean_modules

TinyModel = Callable[..., PreTrainedModel]
SWAPPED = {"gpt2": 2 * 2 + 1 + 2, "gpt_neox": 2 * 2 + 1, "llama": 2 * 2 + 1 + 2}


def test_models_agree_in_values_and_gradients(tiny_model: TinyModel, family: str) -> None:
    """In fp32, over the whole model; a second call finds nothing left to swap."""
    old, new = tiny_model(family), tiny_model(family)
    assert lean_modules(new) == SWAPPED[family]
    assert lean_modules(new) == 0
    ids = torch.arange(2, 50)[None]
    losses = [model(ids, labels=ids).loss for model in (old, new)]
    gradients = [
        torch.autograd.grad(loss, list(model.parameters()))
        for loss, model in zip(losses, (old, new), strict=True)
    ]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-5)
    assert old.state_dict().keys() == new.state_dict().keys()


def llama_modules() -> list[nn.Module]:
    config = LlamaConfig(hidden_size=64, intermediate_size=160)
    torch.manual_seed(0)
    norm = LlamaRMSNorm(64, eps=1e-5)
    nn.init.normal_(norm.weight, 1.0, 0.5)
    return [norm, LlamaMLP(config)]


def lean(module: nn.Module) -> nn.Module:
    assert lean_modules(module) == 1
    return module


def run(module: nn.Module, x: Tensor, grad: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    output = module(x)
    parameters = [p for p in module.parameters() if p.requires_grad]
    return [output.detach(), *torch.autograd.grad(output, [x, *parameters], grad)]


@pytest.mark.parametrize("cached", [64 * 7, 2**18], ids=["parts", "whole"])
def test_in_fp32_they_are_the_same_formula(cached: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether or not a norm's rows are cut into parts, the last of them shorter."""
    monkeypatch.setattr(models_lean, "CACHED", cached)
    x, grad = torch.randn(2, 3, 33, 64).unbind()
    for old, new in zip(llama_modules(), map(lean, llama_modules()), strict=True):
        torch.testing.assert_close(run(new, x, grad), run(old, x, grad), rtol=2e-5, atol=2e-6)


def test_bf16_is_as_near_to_the_truth(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values and input gradients in bf16 are no further from fp32 than transformers' are."""
    monkeypatch.setattr(models_lean, "CACHED", 64 * 7)
    x, grad = torch.randn(2, 200, 64).bfloat16().unbind()
    for old, new in zip(llama_modules(), map(lean, llama_modules()), strict=True):
        for module in (old, new):
            module.bfloat16()
        truth = run(old.float(), x.float(), grad.float())[:2]
        theirs, ours = run(old.bfloat16(), x, grad)[:2], run(new, x, grad)[:2]
        for true, their, our in zip(truth, theirs, ours, strict=True):
            assert our.dtype == torch.bfloat16
            worst = [(each.float() - true).square().mean().sqrt().item() for each in (our, their)]
            assert worst[0] <= 1.05 * worst[1]


def test_mixed_dtypes_give_what_transformers_gives() -> None:
    """An fp32 weight over bf16 activations promotes, as under full fine-tuning with autocast."""
    x = torch.randn(5, 64).bfloat16()
    old, new = llama_modules()[0], lean(llama_modules()[0])
    assert new(x).dtype == old(x).dtype == torch.float32
    torch.testing.assert_close(new(x), old(x), rtol=1e-2, atol=1e-2)


def saved_bytes(function: nn.Module, x: Tensor) -> int:
    """Bytes that autograd keeps for backward, parameters apart, each storage counted once."""
    parameters = {p.untyped_storage().data_ptr() for p in function.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if (place := tensor.untyped_storage().data_ptr()) not in parameters:
            kept[place] = tensor
        return tensor

    x = x.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function(x)
    assert result.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def test_they_keep_less_for_the_backward_pass(tiny_model: TinyModel) -> None:
    """A frozen norm keeps its bf16 input, a frozen MLP gate and up, a GELU its input."""
    x = torch.randn(50, 64).bfloat16()
    for module, kept in zip(map(lean, llama_modules()), (64 * 2 + 4, 2 * 160 * 2), strict=True):
        module.bfloat16().requires_grad_(False)
        assert saved_bytes(module, x) == 50 * kept
    old, new = tiny_model("gpt2"), tiny_model("gpt2")
    lean_modules(new)
    before, after = (saved_bytes(model.transformer.h[0].mlp.act, x) for model in (old, new))
    assert after <= before / 4


@pytest.fixture
def autocast_on_cuda() -> Iterator[None]:
    """bf16 autocast as a GPU has it; ``torch.autocast`` itself wants to see one."""
    dtype = torch.get_autocast_dtype("cuda")
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    torch.set_autocast_enabled("cuda", True)
    yield
    torch.set_autocast_enabled("cuda", False)
    torch.set_autocast_dtype("cuda", dtype)


@pytest.mark.usefixtures("autocast_on_cuda")
def test_autocast_makes_no_fp32_copies_for_norms_on_cuda() -> None:
    """On tensors that have a device, a shape and a dtype but no values, and no gradients."""
    classes = [type(lean(norm)) for norm in (nn.LayerNorm(64), LlamaRMSNorm(64))]
    with FakeTensorMode(), torch.device("cuda"):
        x = torch.empty(50, 64, dtype=torch.bfloat16)
        norms = [nn.LayerNorm(64), LlamaRMSNorm(64)]
        assert nn.functional.layer_norm(x, (64,)).dtype == torch.float32
        for norm, cls in zip(norms, classes, strict=True):
            norm.__class__ = cls
            for name, _ in list(norm.named_parameters()):
                values = torch.empty(64, dtype=torch.bfloat16)
                setattr(norm, name, nn.Parameter(values, requires_grad=False))
            assert norm(x).dtype == torch.bfloat16


def test_a_layer_norm_in_another_dtype_or_without_weights_is_as_it_was() -> None:
    x = torch.randn(50, 64)
    old, new = nn.LayerNorm(64), lean(nn.LayerNorm(64))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(new(x), old(x))
        assert torch.equal(new(x.bfloat16()), old(x.bfloat16()))
    assert lean_modules(nn.LayerNorm(64, elementwise_affine=False)) == 0


def test_an_mlp_of_another_activation_is_left_alone() -> None:
    assert lean_modules(LlamaMLP(LlamaConfig(hidden_size=64, hidden_act="gelu"))) == 0


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_load_model_swaps_them_and_keeps_the_config(
    family: str, model_dir: Callable[[str], Path]
) -> None:
    directory = model_dir(family)
    model: Any = load_model(str(directory))
    assert lean_modules(model) == 0
    activation = model.config.activation_function if family == "gpt2" else model.config.hidden_act
    assert activation == ("gelu_new" if family == "gpt2" else "silu")
