"""Merging: the same answers, and the way back to the last bit."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from alignkit.errors import AlignkitError
from alignkit.lora import (
    LoRAConfig,
    adapters_disabled,
    inject_lora,
    is_merged,
    merge_lora,
    merge_report,
    unmerge_lora,
)

Make = Callable[..., PreTrainedModel]
Shake = Callable[..., nn.Module]

VARIANTS = {
    "lora": {"targets": "all-linear"},
    "rslora": {"targets": "c_attn", "use_rslora": True},
    "dora": {"targets": "all-linear", "use_dora": True},
    "pissa": {"targets": "all-linear", "init": "pissa"},
    "olora": {"targets": "all-linear", "init": "olora", "use_dora": True},
    "biases": {"targets": "c_attn", "bias": "all", "modules_to_save": "mlp.c_fc"},
    "embedding": {"targets": ("wte", "wpe"), "untie": True},
    "head": {"targets": "lm_head", "untie": True, "use_dora": True},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_merged_answers_alike(tiny_model: Make, shake: Shake, ids: Tensor, variant: str) -> None:
    model = tiny_model("gpt2")
    base = model(ids).logits
    shake(inject_lora(model, LoRAConfig(**VARIANTS[variant])))  # type: ignore[arg-type]
    adapted = model(ids).logits
    merge_lora(model)
    assert is_merged(model)
    torch.testing.assert_close(model(ids).logits, adapted, rtol=1e-4, atol=1e-4)
    with adapters_disabled(model):
        assert torch.equal(model(ids).logits, base)
    unmerge_lora(model)
    assert torch.equal(model(ids).logits, adapted)


def test_hundred_cycles_in_bf16_leave_every_bit(
    tiny_model: Make, shake: Shake, ids: Tensor
) -> None:
    model = tiny_model("gpt2").bfloat16()
    config = LoRAConfig(targets="all-linear", bias="all", use_dora=True)
    shake(inject_lora(model, config), size=0.3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    logits = model(ids).logits
    for _ in range(100):
        merge_lora(model)
        unmerge_lora(model)
    after = model.state_dict()
    assert list(after) == list(before)
    for name, value in before.items():
        assert torch.equal(after[name], value)
    assert torch.equal(model(ids).logits, logits)


def test_merging_one_side_of_a_tie_leaves_the_other(tiny_model: Make, shake: Shake) -> None:
    model = shake(inject_lora(tiny_model("gpt2"), LoRAConfig(targets="lm_head", untie=True)))
    table = model.transformer.wte.weight.clone()
    merge_lora(model)
    assert torch.equal(model.transformer.wte.weight, table)
    assert not torch.equal(model.lm_head.base.weight, table)
    unmerge_lora(model)
    assert model.lm_head.base.weight is model.transformer.wte.weight


def test_report(tiny_model: Make, shake: Shake, ids: Tensor) -> None:
    """By hand: logits before and after, in bf16 where merging rounds; the model left as found."""
    model = tiny_model("gpt2").bfloat16()
    shake(inject_lora(model, LoRAConfig(targets="all-linear")))
    before = model(ids).logits.float()
    report = merge_report(model, ids)
    assert not is_merged(model)
    after = merge_lora(model)(ids).logits.float()
    assert merge_report(model, ids) == report
    assert is_merged(model)
    assert report.largest == (after - before).abs().max().item() > 0
    assert report.mean == pytest.approx((after - before).abs().mean().item())
    assert report.scale == before.abs().max().item()
    assert report.tokens == 18
    assert report.flipped == (after.argmax(-1) != before.argmax(-1)).sum()
    assert "of 18 positions" in str(report)


def test_merging_without_adapter_is_refused(tiny_model: Make, ids: Tensor) -> None:
    with pytest.raises(AlignkitError, match="has no adapter"):
        merge_lora(tiny_model("gpt2"))
    with pytest.raises(AlignkitError, match="has no adapter"):
        merge_report(tiny_model("gpt2"), ids)
