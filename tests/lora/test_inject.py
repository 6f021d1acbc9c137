"""Injection, several adapters, and what must go on working around them."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from alignkit.engine import Example, collate, score
from alignkit.errors import AlignkitError
from alignkit.lora import (
    LoRAConfig,
    LoRALinear,
    active_adapter,
    adapter_state_dict,
    adapters_disabled,
    base_parameter_count,
    combine_adapters,
    inject_lora,
    load_adapter_state_dict,
    merge_lora,
    set_adapter,
    trainable_parameter_count,
)

Make = Callable[..., PreTrainedModel]
Shake = Callable[..., nn.Module]


def test_gpt2_counts() -> None:
    """Per block 8 · (768 + 2304) on c_attn and 8 · (768 + 768) on c_proj: 36,864; twelve blocks."""
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config())
    model.tie_weights()
    inject_lora(model, LoRAConfig(targets=("attn.c_attn", "attn.c_proj")))
    assert trainable_parameter_count(model) == 12 * 36_864 == 442_368
    assert base_parameter_count(model) == 124_439_808


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "llama"])
def test_the_default_adapts_every_linear_layer_but_the_head(tiny_model: Make, name: str) -> None:
    """Whatever the family: the matrices of the blocks, and neither embedding nor head."""
    model = tiny_model(name)
    matrices = {
        path.removesuffix(".weight")
        for path, parameter in model.named_parameters()
        if parameter.ndim == 2 and (".0." in path or ".1." in path)
    }
    inject_lora(model)
    adapted = {path for path, module in model.named_modules() if isinstance(module, LoRALinear)}
    assert adapted == matrices


def test_only_adapters_train_and_nothing_changes_at_first(
    tiny_model: Make, family: str, attention: dict[str, tuple[str, ...]], ids: Tensor
) -> None:
    model = tiny_model(family)
    before = model(ids).logits
    assert inject_lora(model, LoRAConfig(targets=attention[family])) is model
    assert torch.equal(model(ids).logits, before)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (".adapters." in name)
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "lora_B" in n)


def test_a_model_goes_on_generating(tiny_model: Make, family: str, ids: Tensor) -> None:
    model = tiny_model(family)
    settings = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    want = model.generate(ids, **settings)
    inject_lora(model, LoRAConfig(targets="all-linear"))
    assert torch.equal(model.generate(ids, **settings), want)


@pytest.mark.parametrize("targets", ["all-linear", "lm_head", "embed_tokens"])
def test_packed_scores_see_the_adapter(tiny_model: Make, shake: Shake, targets: str) -> None:
    """The engine's log-probs equal the adapted model's own, with an adapter on the head too."""
    model = shake(inject_lora(tiny_model("llama"), LoRAConfig(targets=targets)))
    row = [5, 9, 301, 17, 4, 220, 8]
    packed = score(model, collate([Example(row[:3], [row[3:]])]))
    logps = model(torch.tensor([row])).logits[0].log_softmax(-1)
    plain = torch.stack([logps[i - 1, row[i]] for i in range(3, len(row))])
    torch.testing.assert_close(packed, plain, rtol=1e-5, atol=1e-5)


def test_named_adapters_and_none(tiny_model: Make, shake: Shake, ids: Tensor) -> None:
    model = tiny_model("gpt2")
    base = model(ids).logits
    shake(inject_lora(model, LoRAConfig(targets="c_attn", r=2), "first"), seed=1)
    first = model(ids).logits
    shake(inject_lora(model, LoRAConfig(targets=("c_attn", "c_fc"), r=4), "second"), seed=2)
    second = model(ids).logits
    assert active_adapter(model) == "second"
    assert not torch.allclose(first, second)
    set_adapter(model, "first")
    assert torch.equal(model(ids).logits, first)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all(".adapters.first." in name for name in trained)
    set_adapter(model, None)
    assert torch.equal(model(ids).logits, base)
    assert trainable_parameter_count(model) == 0
    set_adapter(model, "second", trainable=False)
    assert torch.equal(model(ids).logits, second)
    assert trainable_parameter_count(model) == 0


def test_disabled_and_back_even_after_an_error(tiny_model: Make, shake: Shake, ids: Tensor) -> None:
    model = tiny_model("gpt2")
    base = model(ids).logits
    shake(inject_lora(model, LoRAConfig(init="pissa", modules_to_save="ln_f")))
    adapted = model(ids).logits
    with adapters_disabled(model):
        torch.testing.assert_close(model(ids).logits, base, rtol=0, atol=0)
    with pytest.raises(RuntimeError), adapters_disabled(model):
        raise RuntimeError
    assert torch.equal(model(ids).logits, adapted)


@pytest.mark.parametrize("start", ["gaussian", "pissa"])
def test_weighted_sum_is_exact(tiny_model: Make, shake: Shake, ids: Tensor, start: str) -> None:
    """0.7 ΔW₁ − 0.3 ΔW₂ on every module, biases and whole modules moved alike."""
    model = tiny_model("gpt2")
    options = {"init": start, "bias": "lora_only"}
    first = LoRAConfig(targets="c_attn", r=2, modules_to_save="ln_f", **options)  # type: ignore[arg-type]
    second = LoRAConfig(targets=("c_attn", "c_fc"), r=3, use_rslora=True, **options)  # type: ignore[arg-type]
    plain = copy.deepcopy(model).state_dict()
    merged = []
    for name, config in (("a", first), ("b", second)):
        torch.manual_seed(7)  # A is drawn alike both times
        alone = shake(inject_lora(copy.deepcopy(model), config), seed=len(name))
        merged.append(
            {k.replace(".base", ""): v for k, v in merge_lora(alone).state_dict().items()}
        )
        torch.manual_seed(7)
        shake(inject_lora(model, config, name), seed=len(name))
    want = {k: v + 0.7 * (merged[0][k] - v) - 0.3 * (merged[1][k] - v) for k, v in plain.items()}
    reference = type(model)(model.config)
    reference.load_state_dict(want)
    combine_adapters(model, {"a": 0.7, "b": -0.3}, "mix")
    assert active_adapter(model) == "mix"
    torch.testing.assert_close(
        model(ids).logits, reference.eval()(ids).logits, rtol=1e-4, atol=1e-4
    )


def test_combining_refuses_dora_and_strangers(tiny_model: Make) -> None:
    model = inject_lora(tiny_model("gpt2"), LoRAConfig(use_dora=True))
    with pytest.raises(AlignkitError, match="DoRA"):
        combine_adapters(model, {"default": 1.0}, "mix")
    with pytest.raises(AlignkitError, match="no adapter 'other'; it has default"):
        combine_adapters(model, {"other": 1.0}, "mix")
    with pytest.raises(AlignkitError, match="no weights"):
        combine_adapters(model, {}, "mix")


def test_deepcopy_that_shares_the_frozen_part(tiny_model: Make, shake: Shake, ids: Tensor) -> None:
    """The DPO reference: same answers, own adapters, one base in memory; training leaves it be."""
    policy = shake(inject_lora(tiny_model("gpt2"), LoRAConfig(init="pissa")))
    frozen = {id(p): p for p in policy.parameters() if not p.requires_grad}
    reference = copy.deepcopy(policy, memo=dict(frozen)).requires_grad_(False)
    own = {id(p) for p in reference.parameters()} - set(frozen)
    assert len(own) == len(adapter_state_dict(policy)) / 2  # A and B, not the frozen start
    want = policy(ids).logits
    shake(policy, seed=5)
    assert torch.equal(reference(ids).logits, want)
    assert not torch.allclose(policy(ids).logits, want)
    assert trainable_parameter_count(policy) > 0


def test_misuse_is_refused(tiny_model: Make, shake: Shake) -> None:
    model = tiny_model("gpt2")
    with pytest.raises(AlignkitError, match="has no adapter; call inject_lora"):
        set_adapter(model, "default")
    inject_lora(model, LoRAConfig(targets="c_attn"))
    with pytest.raises(AlignkitError, match="already has an adapter 'default'"):
        inject_lora(model)
    with pytest.raises(AlignkitError, match=r"adapter name 'a\.b'"):
        inject_lora(model, name="a.b")
    with pytest.raises(AlignkitError, match="trains whole in one adapter"):
        inject_lora(model, LoRAConfig(targets="c_fc", modules_to_save="c_attn"), "other")
    inject_lora(model, LoRAConfig(targets="c_fc"), "other")
    merge_lora(model)
    for act in (lambda: inject_lora(model, name="third"), lambda: set_adapter(model, "default")):
        with pytest.raises(AlignkitError, match="unmerge_lora first"):
            act()
    with pytest.raises(AlignkitError, match=r"base is a LayerNorm; give a Linear or Conv1D"):
        LoRALinear(nn.LayerNorm(3))


def test_state_names_are_stable_and_strict(tiny_model: Make, shake: Shake, ids: Tensor) -> None:
    config = LoRAConfig(targets="c_attn", layers=(0,), bias="all", modules_to_save="mlp.c_fc")
    model = shake(inject_lora(tiny_model("gpt2"), config))
    state = {name: tensor.clone() for name, tensor in adapter_state_dict(model).items()}
    assert {name for name in state if ".h.0." in name} == {
        f"transformer.h.0.{path}.adapters.default.{key}"
        for path, key in (
            ("ln_1", "bias"),
            ("attn.c_attn", "lora_A"),
            ("attn.c_attn", "lora_B"),
            ("attn.c_attn", "bias"),
            ("attn.c_proj", "bias"),
            ("ln_2", "bias"),
            ("mlp.c_fc", "weight"),
            ("mlp.c_fc", "bias"),
            ("mlp.c_proj", "bias"),
        )
    }
    other = inject_lora(tiny_model("gpt2"), config)
    load_adapter_state_dict(other, state)
    assert torch.equal(other(ids).logits, model(ids).logits)
    a = "transformer.h.0.attn.c_attn.adapters.default.lora_A"
    broken = {**state, a: torch.zeros(32, 2), "x.lora_A": torch.zeros(1)}
    del broken["transformer.h.0.ln_1.adapters.default.bias"]
    before = {name: tensor.clone() for name, tensor in adapter_state_dict(other).items()}
    with pytest.raises(AlignkitError) as error:
        load_adapter_state_dict(other, broken)
    message = str(error.value)
    assert "missing transformer.h.0.ln_1.adapters.default.bias" in message
    assert "unexpected x.lora_A" in message
    assert f"{a} is 32x2, the model's is 32x8" in message
    assert "\n" not in message
    for name, tensor in adapter_state_dict(other).items():
        assert torch.equal(tensor, before[name])


def test_under_ddp(tiny_model: Make, ids: Tensor, tmp_path: object) -> None:
    """One gloo process: every adapter gradient goes through DDP's buckets."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    try:
        model = inject_lora(tiny_model("gpt2"), LoRAConfig(targets="all-linear"))
        plain = copy.deepcopy(model)
        parallel = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
        parallel(ids, labels=ids).loss.backward()
        plain(ids, labels=ids).loss.backward()
        for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
            assert (mine.grad is None) == (theirs.grad is None)
            if mine.grad is not None:
                torch.testing.assert_close(mine.grad, theirs.grad)
    finally:
        torch.distributed.destroy_process_group()
