"""The residual stream in fp32 over bf16 weights: closer to fp32, at no kept activation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import median

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoXConfig, LlamaConfig

from alignkit import DPOModule
from alignkit.engine import Example, collate, response_sums, score
from alignkit.engine.score import last_hidden_state
from alignkit.errors import AlignkitError
from alignkit.lora import LoRAConfig, inject_lora
from alignkit.models.lean import lean_modules
from alignkit.models.residual import widen_residual
from alignkit.modules import SFTModule
from tests.modules.helpers import answers, loader, trainer

DEEP = {
    "gpt2": GPT2Config(vocab_size=384, n_positions=128, n_embd=32, n_layer=8, n_head=4),
    "gpt_neox": GPTNeoXConfig(
        vocab_size=384, hidden_size=32, intermediate_size=64, num_hidden_layers=8,
        num_attention_heads=4, max_position_embeddings=128,
    ),
    "llama": LlamaConfig(
        vocab_size=384, hidden_size=32, intermediate_size=64, num_hidden_layers=8,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
    ),
}  # fmt: skip


def deep_model(family: str, seed: int = 0) -> nn.Module:
    """Eight blocks whose sums matter: weights wider than the initialisation, in bf16's values."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(DEEP[family])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
            parameter.copy_(parameter.bfloat16())
    lean_modules(model)
    return model.eval().requires_grad_(False)


def batch() -> object:
    torch.manual_seed(1)
    ids = torch.randint(384, (12, 40)).tolist()
    return collate([Example(row[:20], [row[20:30], row[30:]]) for row in ids])


def sums(model: nn.Module, mixed: bool = True) -> Tensor:
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        return response_sums(score(model, batch()), batch())


def error(states: Tensor, truth: Tensor) -> float:
    return ((states - truth).norm() / truth.norm()).item()


@pytest.mark.parametrize("mixed", [True, False])
@pytest.mark.parametrize("family", DEEP)
def test_hidden_states_are_closer_to_fp32(family: str, mixed: bool) -> None:
    """Over three models, against fp32 with the same weights: 480 tokens of 32 channels each."""

    def states(model: nn.Module, mixed: bool) -> Tensor:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            return last_hidden_state(model, batch()).float()

    plain, wide = [], []
    for seed in range(3):
        truth = states(deep_model(family, seed), mixed=False)
        plain.append(error(states(deep_model(family, seed).bfloat16(), mixed), truth))
        widened = deep_model(family, seed).bfloat16()
        widen_residual(widened)
        wide.append(error(states(widened, mixed), truth))
    assert sum(wide) < 0.93 * sum(plain), (wide, plain)


@pytest.mark.parametrize("family", DEEP)
def test_gradients_are_the_same_up_to_rounding(family: str) -> None:
    def gradients(wide: bool, dtype: torch.dtype, seed: int) -> Tensor:
        model = deep_model(family, seed).to(dtype)
        if wide:
            widen_residual(model)
        torch.manual_seed(2)
        inject_lora(model, LoRAConfig(targets="all-linear"))
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            score(model, batch()).sum().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    plain, wide = [], []
    for seed in range(4):
        truth = gradients(False, torch.float32, seed)
        plain.append(error(gradients(False, torch.bfloat16, seed), truth))
        wide.append(error(gradients(True, torch.bfloat16, seed), truth))
    assert median(wide) < 1.05 * median(plain) < 0.1, (wide, plain)


def test_kept_activations_do_not_grow() -> None:
    def kept(wide: bool) -> int:
        model = deep_model("llama").bfloat16()
        if wide:
            widen_residual(model)
        inject_lora(model, LoRAConfig(targets="all-linear"))
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        keep = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        with keep, torch.autocast("cpu", torch.bfloat16):
            loss = score(model, batch()).sum()
        assert loss.requires_grad
        return sum(sizes.values())

    assert kept(True) <= 1.02 * kept(False)


def test_an_fp32_model_is_left_as_it_is() -> None:
    model = deep_model("llama")
    truth = sums(model, mixed=False)
    widen_residual(model)
    assert torch.equal(sums(model, mixed=False), truth)


def test_a_norm_that_would_pass_fp32_on_is_refused(tiny_model: Callable[..., nn.Module]) -> None:
    with pytest.raises(AlignkitError, match=r"model\.residual float32: .*Norm"):
        widen_residual(tiny_model("llama").bfloat16())  # its norms were not lightened


@pytest.mark.parametrize("family", DEEP)
def test_the_model_still_runs_as_transformers_made_it(family: str) -> None:
    """Without autocast and outside packed rows, as generation calls it."""
    model = deep_model(family).bfloat16()
    plain = model(input_ids=torch.arange(20)[None]).logits
    widen_residual(model)
    wide = model(input_ids=torch.arange(20)[None]).logits
    assert wide.dtype == torch.bfloat16
    assert torch.allclose(wide, plain, atol=0.3, rtol=0.1)
    assert model.generate(torch.arange(5)[None], max_new_tokens=4, do_sample=False).shape == (1, 9)


def test_policy_and_reference_are_widened_alike(model_dir: Callable[[str], Path]) -> None:
    """Before the first step they agree to the last bit, and a cache of its own keeps the scores."""
    module = DPOModule(
        str(model_dir("llama")), dtype="bfloat16", residual="float32",
        lora=LoRAConfig(targets="all-linear"),
    )  # fmt: skip
    assert module.reference is not None
    ours, theirs = (sums(model) for model in (module.model, module.reference.model))
    assert torch.equal(ours, theirs)
    plain = DPOModule(str(model_dir("llama")), dtype="bfloat16").model
    assert not torch.equal(sums(plain), ours)
    assert module.reference._name(torch.bfloat16).endswith("bfloat16-residual")


def test_a_reference_with_trained_embeddings_is_widened_alike(
    model_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    """Its embedding's trained rows are fp32, and rotations keep the dtype of the base."""
    base, lora = str(model_dir("llama")), LoRAConfig(modules_to_save=["embed_tokens"])
    options = {"dtype": "bfloat16", "residual": "float32"}
    sft = SFTModule(base, lora=lora, **options)
    trainer(tmp_path, max_steps=1).fit(sft, loader(answers(4), 2))
    sft.trainer.save_checkpoint(tmp_path / "sft.ckpt")
    place = str(tmp_path / "sft.ckpt")
    module = DPOModule(base, init_from=place, reference=place, **options)
    ours, theirs = (sums(model) for model in (module.model, module.reference.model))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0.01)
